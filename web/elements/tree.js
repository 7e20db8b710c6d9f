/** The module tree of a model: folds, a search over all modules, addresses to copy. */
import { html, nothing } from "lit";
import { ViewElement } from "../core/element.js";
import { grouped } from "../core/legend.js";
import { formatted } from "../core/number.js";

const DRAWN = 2000;
const FOUND = 100;
const SIZES = [
  { size: 1e9, letter: " B" },
  { size: 1e6, letter: " M" },
  { size: 1e3, letter: " k" },
];

/** A number of parameters in three digits: `124 M`. */
export function sizeText(count) {
  for (const { size, letter } of SIZES)
    if (count >= size) return formatted(count / size, ".3g") + letter;
  return String(count);
}

const shapeText = (shape) => shape.join(" × ") || "one number";

function* walk(branch) {
  yield branch;
  for (const child of branch.children ?? []) yield* walk(child);
}

export class Tree extends ViewElement {
  static readable = true;
  static saves = ["SVG", "PNG", "CSV", "JSON"];
  static properties = { query: { state: true } };

  constructor() {
    super();
    this.query = "";
  }

  picture(view) {
    const find = html`<label class="uh-find">find a module or an address <input type="search" @input=${(e) => (this.query = e.target.value)}></label>`;
    return html`${find}<div class="uh-tree">${this.query.trim() ? this.found(view) : this.branch(view.root, this.depth(view.root), 0)}</div>`;
  }

  /** As many floors as hold few enough modules. */
  depth(root) {
    let [depth, drawn, level] = [0, 0, [root]];
    while (level.length && (depth === 0 || drawn + level.length <= DRAWN)) {
      drawn += level.length;
      depth += 1;
      level = level.flatMap((b) => b.children ?? []);
    }
    return depth;
  }

  found(view) {
    const wanted = this.query.trim().toLowerCase();
    const hit = (b) => [b.path, b.name, b.type, ...(b.sites ?? [])].some((t) => t?.toLowerCase().includes(wanted));
    const all = [...walk(view.root)].filter(hit);
    const lines = all.slice(0, FOUND).map(
      (b) => html`<div class="uh-mod uh-leaf">${this.line({ ...b, name: b.path || b.name })}${this.own(b)}</div>`,
    );
    const more = all.length > FOUND ? `, the first ${FOUND} of them` : "";
    return html`<p class="uh-note" aria-live="polite">${all.length} found${more}</p>${lines}`;
  }

  line(b) {
    const exact = `${grouped(b.parameters ?? 0)} parameters`;
    return html`<span class="uh-modname">${b.name}</span>${(b.many ?? 1) > 1 ? html`<span class="uh-count">${b.many} alike</span>` : nothing}${b.type ? html`<span class="uh-modtype">${b.type}</span>` : nothing}${b.parameters ? html`<span class="uh-modsize" title=${exact}>${sizeText(b.parameters)}</span>` : nothing}`;
  }

  own(b) {
    const shapes = Object.entries(b.shapes ?? {});
    return html`${shapes.length ? html`<p class="uh-shapes">${shapes.map(([name, shape]) => html`<span><span class="uh-modname">${name}</span> ${shapeText(shape)}</span>`)}</p>` : nothing}${b.sites?.length ? html`<p class="uh-sites">${b.sites.map((site) => html`<button type="button" class="uh-site" title="copy this address" @click=${() => navigator.clipboard?.writeText(site)}><code>${site}</code></button>`)}</p>` : nothing}`;
  }

  branch(b, depth, level) {
    const children = b.children ?? [];
    const own = Object.keys(b.shapes ?? {}).length || b.sites?.length;
    if (!children.length && !own) return html`<div class="uh-mod uh-leaf">${this.line(b)}</div>`;
    const inner =
      depth <= 1 && children.length
        ? html`<p class="uh-note">${children.length} modules inside</p>`
        : children.map((child) => this.branch(child, depth - 1, level + 1));
    return html`<details class="uh-mod" ?open=${level < 2}><summary>${this.line(b)}</summary>${this.own(b)}${inner}</details>`;
  }
}
