/**
 * What a head does with these tokens, as one number, by which heads can be put in order.
 *
 * The scores are those of `methods/read/head_kinds.py`, taken on the prompt that is shown instead of
 * random tokens said twice: few queries, and other things than position and repetition to go by. They
 * put heads in order and name none.
 */

const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);

/** Over the queries, the weight on the keys that `looked(query)` gives; queries with none are left out. */
function weightOn(pattern, looked) {
  const sums = pattern.map((row, q) => {
    const keys = looked(q).filter((k) => (row[k] ?? null) !== null);
    return keys.length ? keys.reduce((sum, k) => sum + row[k], 0) : null;
  });
  return mean(sums.filter((sum) => sum !== null));
}

/** Mean entropy over the queries that see two keys or more, in nats. */
function entropy(pattern) {
  const rows = pattern.map((row) => row.filter((w) => w !== null)).filter((row) => row.length > 1);
  const one = (row) => {
    const total = row.reduce((a, b) => a + b, 0) || 1;
    return row.reduce((sum, w) => (w > 0 ? sum - (w / total) * Math.log(w / total) : sum), 0);
  };
  return mean(rows.map(one));
}

/** Earlier positions of the token that stands at `q`. */
const earlier = (tokens, q) => [...tokens.keys()].filter((k) => k < q && tokens[k] === tokens[q]);

/** Ways to put heads in order: the largest score first, or the least (`down`). */
export const ORDERS = [
  { name: "entropy, focused first", unit: "nats", down: true, score: entropy },
  { name: "weight on the token before", score: (p) => weightOn(p, (q) => (q ? [q - 1] : [])) },
  { name: "weight on the first token", score: (p) => weightOn(p, (q) => (q ? [0] : [])) },
  {
    name: "weight on the same token before",
    repeats: true,
    score: (p, tokens) => weightOn(p, (q) => earlier(tokens, q)),
  },
  {
    name: "weight on what followed the same token (induction)",
    repeats: true,
    score: (p, tokens) => weightOn(p, (q) => earlier(tokens, q).map((k) => k + 1).filter((k) => k < q)),
  },
];

/** The orders that say something of these tokens. */
export const ordersFor = (tokens) =>
  ORDERS.filter((order) => !order.repeats || new Set(tokens).size < tokens.length);

/** Numbers of the heads in an order, and the score of each; heads without one come last. */
export function ordered(view, order) {
  const scores = view.heads.map((head) => order.score(head.pattern, view.tokens));
  const sign = order.down ? 1 : -1;
  const rank = (i) => (scores[i] === null ? Infinity : sign * scores[i]);
  const sorted = [...scores.keys()].sort((a, b) => (rank(a) === rank(b) ? a - b : rank(a) - rank(b)));
  return { sorted, scores };
}
