/** A real table that can be sorted by its columns. */
import { html, nothing } from "lit";
import { ViewElement } from "../core/element.js";
import { MINUS, NONE, decimalsFor, formatted, show } from "../core/number.js";
import { agrees, named } from "../core/selection.js";

const ORDERS = [null, "descending", "ascending"];

/** One cell as it is printed; a format that does not fit the value is not applied. */
export function cellText(cell, column, decimals, isFloat) {
  if (cell === null) return NONE;
  if (typeof cell === "boolean") return cell ? "yes" : "no";
  if (typeof cell === "string") return cell;
  if (column.format) {
    return formatted(cell, column.format) ?? show(cell, decimals, column.format.includes("+"));
  }
  return isFloat ? show(cell, decimals, false) : String(cell).replace("-", MINUS);
}

export class Table extends ViewElement {
  static readable = true;
  static properties = { order: { state: true } };

  constructor() {
    super();
    this.order = { column: -1, way: 0 };
  }

  picture(view) {
    const order = this.sorted(view);
    const columns = view.columns.map((column, i) => {
      const cells = view.rows.map((row) => row[i]);
      const numbers = cells.filter((c) => typeof c === "number");
      const filled = cells.filter((c) => c !== null);
      // JSON has one kind of number: a column is whole only if all of it is.
      const whole = numbers.every(Number.isInteger);
      const right = filled.length > 0 && filled.every((c) => typeof c !== "string");
      return { ...column, right, whole, decimals: decimalsFor(whole ? [] : numbers) };
    });
    const head = (column, i) => {
      const way = this.order.column === i ? ORDERS[this.order.way] : null;
      const arrow = way === "descending" ? "▾" : way === "ascending" ? "▴" : "";
      return html`<th scope="col" class=${column.right ? "uh-num" : nothing} aria-sort=${way ?? nothing}
        ><button type="button" class="uh-sort" title="Sort by ${column.name}" @click=${() => this.sort(i)}>${column.name}${column.unit ? html`<span class="uh-unit"> ${column.unit}</span>` : nothing}<span aria-hidden="true">${arrow}</span></button></th>`;
    };
    const cell = (row, column, i) => {
      const text = cellText(row[i], column, column.decimals, !column.whole);
      return i === 0 && !column.right
        ? html`<th scope="row">${text}</th>`
        : html`<td class=${column.right ? "uh-num" : nothing}>${text}</td>`;
    };
    return html`<div class="uh-scroll" tabindex="0" role="region" aria-label=${view.title || "table"}>
      <table class="uh-rows">
        <thead><tr>${columns.map(head)}</tr></thead>
        <tbody>${order.map((r) => html`<tr data-at="${r},0">${columns.map((c, i) => cell(view.rows[r], c, i))}</tr>`)}</tbody>
      </table>
    </div>`;
  }

  sort(column) {
    const way = this.order.column === column ? (this.order.way + 1) % 3 : 1;
    this.order = { column, way };
  }

  /** Row numbers in the chosen order; missing cells last. */
  sorted(view) {
    const rows = view.rows.map((_, i) => i);
    const { column, way } = this.order;
    if (!ORDERS[way]) return rows;
    const sign = way === 1 ? -1 : 1;
    return rows.sort((a, b) => {
      const [x, y] = [view.rows[a][column], view.rows[b][column]];
      if (x === null || y === null) return Number(x === null) - Number(y === null);
      if (typeof x === "string" || typeof y === "string") return -sign * -String(x).localeCompare(String(y));
      return sign * (x - y);
    });
  }

  /** Rows can be pointed at where they name parts of the model. */
  size() {
    const rows = this.view.rows.length;
    return this.view.rows.some((_, r) => Object.keys(this.spot(r)).length) ? { rows, cols: 1 } : null;
  }

  say(r) {
    return this.view.rows[r].map((c) => c ?? "no value").join(", ");
  }

  spot(r) {
    return named(String(this.view.rows[r]?.[0] ?? ""));
  }

  find(chosen) {
    const at = this.view.rows.findIndex((_, r) => agrees(this.spot(r), chosen));
    return at < 0 ? null : [at, 0];
  }
}
