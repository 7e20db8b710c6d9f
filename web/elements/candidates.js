/** Behind a cell of a lens grid: its likeliest tokens, and how these fare over the rows. */
import { html, nothing } from "lit";
import { decimalsFor, show } from "../core/number.js";
import { tokenHtml, visible } from "../core/tokens.js";

const LINES = 6; // as many as there are inks

/**
 * One token in one column, over the rows, as a line of a chart. Where the token is not among those
 * listed its value is unknown, but no larger than the least that is: a band says so.
 */
export function path({ tokens, ids, values }, token, col) {
  const at = ids.map((row) => row[col].indexOf(token));
  const least = values.map((row) => row[col].at(-1) ?? null);
  const known = at.map((rank, r) => (rank < 0 ? null : values[r][col][rank]));
  return {
    name: visible(tokens[token]),
    values: known,
    low: known.map((value, r) => value ?? (least[r] === null ? null : 0)),
    high: known.map((value, r) => value ?? least[r]),
  };
}

/**
 * The list and the chart of the cell that is kept.
 * @param {any} host the grid
 * @param {any} view as it is drawn
 * @param {number[]} cell
 */
export function behind(host, view, cell) {
  const [r, c] = cell;
  const { candidates, unit = "", scale } = host.view;
  const here = candidates.ids[r][c];
  const values = candidates.values[r][c];
  const decimals = decimalsFor(values);
  const followed = [...new Set([...here.slice(0, 1), ...host.followed])].slice(0, LINES);
  const item = (token, rank) => {
    const on = host.followed.includes(token);
    return html`<li><button type="button" aria-pressed=${String(on)} title="${on ? "Let it go" : "Follow it, here and in other cells"}" @click=${() => host.followToken(token)}>${tokenHtml(candidates.tokens[token])}</button><span class="uh-num">${show(values[rank], decimals, false)}</span></li>`;
  };
  const chart = {
    kind: "lines",
    title: `Over ${view.row_name || "rows"}, at ${view.col_name || "column"} ${visible(view.cols[c])}`,
    x: view.rows,
    x_name: view.row_name,
    y_name: unit,
    span: scale === "probability" ? [0, 1] : null,
    series: followed.map((token) => path(candidates, token, c)),
  };
  const gaps = chart.series.some((line) => line.values.includes(null));
  return html`<div class="uh-behind" role="group" aria-label="candidates of one cell">
    <div><p class="uh-label">${view.row_name} ${visible(view.rows[r])}, ${view.col_name} ${visible(view.cols[c])}</p><p class="uh-note">${unit} of the likeliest; click one to follow it</p><ol>${here.map(item)}</ol></div>
    <div>${host.nest("path", chart, host.level + 1, { bare: true })}${gaps ? html`<p class="uh-note">Band without a line: the token is not among the ${here.length} likeliest there, so its value lies in the band.</p>` : nothing}</div>
  </div>`;
}
