/** A view as plain rows and columns, for CSV and for the table behind a picture (`view/flat.py`). */
import { delta } from "./delta.js";
import { pngSize } from "./png.js";

/** @returns {{title: string, header: string[], rows: any[][]}[]} in reading order. */
export function flatten(view) {
  const tables = FLAT[view.kind]?.(view) ?? [];
  if (!view.control) return tables;
  const control = flatten(view.control).map((t) => ({ ...t, title: `control: ${t.title}` }));
  return [...tables, ...control];
}

const table = (view, header, rows, part = "") => ({
  title: part ? `${view.title ?? ""}: ${part}` : (view.title ?? ""),
  header,
  rows,
});

const probabilities = (view, { label, tokens, values }) =>
  table(view, ["token", "probability"], tokens.map((t, i) => [t, values?.[i] ?? null]), label);

function curves(view, axis, series) {
  const header = Object.keys(axis);
  const columns = Object.values(axis);
  for (const line of series) {
    header.push(line.name);
    columns.push(line.values);
    if (line.low && line.high) {
      header.push(`${line.name} low`, `${line.name} high`);
      columns.push(line.low, line.high);
    }
  }
  return table(view, header, columns[0].map((_, i) => columns.map((c) => c[i])));
}

function facts(view) {
  const pairs = Object.entries(view.facts ?? {});
  return pairs.length ? [table(view, ["name", "value"], pairs, "numbers")] : [];
}

function* modules(root) {
  const shapes = Object.entries(root.shapes ?? {}).map(([n, s]) => `${n} ${s.join("x")}`.trimEnd());
  const name = root.path || root.name;
  const sites = (root.sites ?? []).join(" ");
  yield [name, root.type ?? "", root.many ?? 1, root.parameters ?? 0, shapes.join("; "), sites];
  for (const child of root.children ?? []) yield* modules(child);
}

function candidates(v) {
  const { tokens, ids, values } = v.candidates;
  const header = [v.row_name || "row", v.col_name || "column", "rank", "token", v.unit || "value"];
  const rows = v.rows.flatMap((row, r) =>
    v.cols.flatMap((col, c) => ids[r][c].map((token, rank) => [row, col, rank, tokens[token], values[r][c][rank]])),
  );
  return table(v, header, rows, "candidates");
}

const grouped = (groups) => groups.flatMap(({ name, nodes }) => nodes.map((id) => [name, id]));

/** Text in quotes, as Python writes it. */
const quoted = (text) =>
  text.includes("'") && !text.includes('"')
    ? `"${text}"`
    : `'${text.replaceAll("\\", "\\\\").replaceAll("'", "\\'").replaceAll("\n", "\\n")}'`;

const FLAT = {
  sentences: (v) => [table(v, ["sentence"], v.items.map((item) => [item]))],
  tokens: (v) => [
    table(v, ["pos", "token", v.unit || "value"], v.tokens.map((t, i) => [i, t, v.values?.[i] ?? null])),
  ],
  grid(v) {
    const header = [`${v.row_name || "row"} / ${v.col_name || "column"}`, ...v.cols];
    const one = (values, part) => table(v, header, v.rows.map((r, i) => [r, ...values[i]]), part);
    const measures = v.measures ?? [];
    return [
      one(v.values, ""),
      ...measures.map((m) => one(m.values, `${m.name} ${m.unit ?? ""}`.trimEnd())),
      ...(v.candidates ? [candidates(v)] : []),
    ];
  },
  bars(v) {
    const name = v.baseline_name ?? "random baseline";
    const header = ["label", v.unit || "value"];
    let rows = v.labels.map((label, i) => [label, v.values[i]]);
    if (v.baseline) {
      header.push(`${name} low`, `${name} high`);
      rows = rows.map((row, i) => [...row, ...v.baseline[i]]);
    }
    if ((v.total ?? null) !== null)
      rows.push([v.total_label ?? "", v.total, ...header.slice(2).map(() => null)]);
    return [table(v, header, rows)];
  },
  heads: (v) =>
    v.heads.map((head) =>
      table(v, ["query / key", ...v.tokens], v.tokens.map((t, i) => [t, ...head.pattern[i]]), head.label),
    ),
  lines: (v) => [curves(v, { [v.x_name || "x"]: v.x }, v.series)],
  table: (v) => [table(v, v.columns.map((c) => c.name + (c.unit ? ` (${c.unit})` : "")), v.rows)],
  texts: (v) => v.columns.map((column) => probabilities(v, column)),
  timeline(v) {
    const axis = { [v.x_name || "step"]: v.steps, ...(v.tokens && { token: v.tokens }) };
    const marks = v.marks?.length
      ? [table(v, ["mark", "step"], v.marks.map((m) => [m.label, m.step]), "marks")]
      : [];
    return [curves(v, axis, v.series), ...marks];
  },
  graph(v) {
    const { source, target, weight, inside, label } = v.edges;
    const ids = v.nodes.map((n) => n.id);
    const edges = source.map((a, e) => [ids[a], ids[target[e]], weight[e], inside?.[e] ?? true, label?.[e] ?? ""]);
    const nodes = v.nodes.map((n) => [n.id, n.label || n.id, n.y, n.x, n.role ?? "", n.value ?? null]);
    return [
      table(v, ["source", "target", `weight ${v.unit ?? ""}`.trimEnd(), "inside", "name"], edges, "edges"),
      table(v, ["node", "label", v.y_name ?? "layer", v.x_name || "x", "role", "value"], nodes, "nodes"),
      ...(v.supernodes?.length ? [table(v, ["group", "node"], grouped(v.supernodes), "groups")] : []),
      ...(v.pins?.length ? [table(v, ["node"], v.pins.map((id) => [id]), "pinned")] : []),
      ...facts(v),
    ];
  },
  tree: (v) => [
    table(v, ["module", "class", "alike", "parameters", "shapes", "sites"], [...modules(v.root)]),
  ],
  picture: (v) => [
    table(v, ["width", "height", "alt"], [[...pngSize(v.png), v.alt ?? ""]]),
    ...(v.grid ? flatten(v.grid) : []),
  ],
  feature(v) {
    const rows = v.examples.flatMap((e, n) => e.tokens.map((t, i) => [n, e.note ?? "", i, t, e.values[i]]));
    return [
      table(v, ["example", "note", "pos", "token", v.unit || "activation"], rows, "examples"),
      ...["promoted", "suppressed", "neighbours"]
        .filter((name) => v[name]?.length)
        .map((name) => table(v, [name, "value"], v[name], name)),
      ...(v.histograms ?? []).map((h) =>
        table(v, ["from", "to", "count"], h.counts.map((c, i) => [h.edges[i], h.edges[i + 1], c]), h.name),
      ),
      ...facts(v),
    ];
  },
  bench(v) {
    const names = Object.keys(v.arms[0]?.effects ?? {});
    const header = ["arm", `strength ${v.unit ?? ""}`.trimEnd(), "text", ...names, "note"];
    const rows = v.arms.map((arm) => [
      arm.label,
      arm.strength ?? null,
      arm.tokens.join(""),
      ...names.map((name) => arm.effects[name]),
      arm.note ?? "",
    ]);
    return [table(v, header, rows, `arms after ${quoted(v.prompt)}`), ...v.arms.map((arm) => probabilities(v, arm))];
  },
  diff: (v) =>
    [
      ["A", v.a],
      ["B", v.b],
      ["A - B", delta(v)],
    ].flatMap(([name, side]) =>
      flatten({ ...side, control: undefined }).map((t) => ({
        ...t,
        title: [v.title, name, t.title].filter(Boolean).join(": "),
      })),
    ),
  group: (v) => v.views.flatMap(flatten),
};

/** The tables as CSV with exact numbers; several are parted by an empty line and `# title`. */
export function toCsv(view) {
  const tables = flatten(view);
  const one = ({ title, header, rows }) =>
    (tables.length > 1 ? `# ${title.trim().split(/\s+/).join(" ")}\n` : "") +
    [header, ...rows].map((row) => row.map(field).join(",") + "\n").join("");
  return tables.map(one).join("\n");
}

/** One cell as Python writes it. */
export function written(cell) {
  if (cell === null || cell === undefined) return "";
  return typeof cell === "boolean" ? (cell ? "True" : "False") : String(cell);
}

function field(cell) {
  const text = written(cell);
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
