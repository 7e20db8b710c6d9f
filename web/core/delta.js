/** The difference of the two sides of a `diff` (`panels.Diff.delta`). */
function minus(a, b) {
  return a.map((x, i) => {
    if (Array.isArray(x)) return minus(x, b[i]);
    return x === null || b[i] === null ? null : x - b[i];
  });
}

/** A - B: empty where either has no value, on a diverging scale. */
export function delta(view) {
  const { cell_text, marks, measures, candidates, about, control, ...rest } = view.a;
  const title = `${view.a.title || "A"} − ${view.b.title || "B"}`;
  return { ...rest, values: minus(view.a.values, view.b.values), scale: "diverging", limit: view.limit ?? null, title };
}
