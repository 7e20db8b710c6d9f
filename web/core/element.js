/**
 * What every view element shares: its frame, pointing and selecting, and the numbers behind it.
 *
 * Elements draw into the page itself, not into a shadow root: the static page and the elements then
 * share one style sheet (`view/style.css`), and the picture does not change when the script takes
 * over. A kind says how it is drawn (`picture`) and, where parts of it can be pointed at, what they
 * are (`size`, `say`, `spot`, `find`); the rest is here.
 *
 * A part is addressed by row and column. Marks made of HTML or SVG carry `data-at="row,col"`;
 * canvases override `placeAt` and `light`.
 */
import { LitElement, html, nothing } from "lit";
import { heading, howMade } from "./about.js";
import { flatten, written } from "./flat.js";
import { rescaled, shareScale } from "./rescale.js";
import { selection } from "./selection.js";
import { tame, tokenHtml } from "./tokens.js";
import { tools } from "./tools.js";

const HIDDEN_CELLS = 2000; // a screen reader gains nothing from a longer table
const CONTROLS = "button, summary, input, select, a";
const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/** The tag of a kind. */
export const tagOf = (kind) => `uh1-${kind}`;

/** An element that draws this document. @returns {any} */
export function element(view, options = {}) {
  const made = document.createElement(tagOf(view.kind));
  return Object.assign(made, { view, ...options });
}

/**
 * @typedef {import("lit").TemplateResult | typeof nothing} Drawn
 * @typedef {(number | null)[]} Place a row and a column; null stands for all of them
 */

export class ViewElement extends LitElement {
  /** @type {import("lit").PropertyDeclarations} */
  static properties = {
    view: { attribute: false },
    level: { attribute: false },
    told: { attribute: false },
    nested: { attribute: false }, // a part of another view: without tools
    bare: { attribute: false }, // without the table behind it: the view around it has that
    log: { state: true }, // colours on the logarithmic scale: the reader's choice
  };

  /** Whether pictures of this kind always are text or a real table. */
  static readable = false;

  /** The formats that it saves; null: all. @type {string[] | null} */
  static saves = null;

  constructor() {
    super();
    /** @type {any} */
    this.view = null;
    this.level = 3;
    this.told = {};
    this.nested = false;
    this.bare = false;
    this.log = false;
    /** The static picture, should drawing fail. @type {Element | null} */
    this.fallback = null;
    /** The document as it was written, for an export without loss. @type {string | null} */
    this.source = null;
    /** @type {Place | null} */
    this.peeked = null;
    /** @type {Place | null} */
    this.kept = null;
    /** The document of a view inside another one, as it was given, in JSON. @type {string | null} */
    this.given = null;
    /** The views inside this one, by name. @type {Map<string | number, ViewElement>} */
    this.parts = new Map();
    /** What is drawn: the view with its numbers rescaled. @type {any} */
    this.drawn = null;
  }

  /** @returns {any} */
  createRenderRoot() {
    return this;
  }

  connectedCallback() {
    super.connectedCallback();
    this.classList.add("uh-view", `uh-${this.kind}`);
    this.unsubscribe = selection.subscribe((chosen) => this.follow(chosen));
    for (const [type, act] of Object.entries(this.#acts)) this.addEventListener(type, act);
  }

  disconnectedCallback() {
    super.disconnectedCallback();
    this.unsubscribe?.();
    for (const [type, act] of Object.entries(this.#acts)) this.removeEventListener(type, act);
  }

  get kind() {
    return this.localName.slice(4);
  }

  // ---- what a kind says about itself -------------------------------------------------------

  /**
   * The drawing of `view`, whose numbers are rescaled and whose limits are settled.
   * @returns {Drawn}
   */
  picture(view) {
    return nothing;
  }

  /** The document as the reader wants it drawn; what is saved stays whole. */
  shaped(view) {
    return view;
  }

  /** Whether the picture of `view` is itself made of text or of a real table. */
  isReadable(view) {
    return /** @type {typeof ViewElement} */ (this.constructor).readable;
  }

  /** Whether the reader can have the colours of `view` on a logarithmic scale. */
  offersLog(view) {
    return false;
  }

  /**
   * Rows and columns that can be pointed at, or null.
   * @returns {{rows: number, cols: number} | null}
   */
  size() {
    return null;
  }

  /** One part in words. */
  say(row, col) {
    return "";
  }

  /**
   * What one part selects: some of layer, pos, head, feature.
   * @returns {Record<string, any>}
   */
  spot(row, col) {
    return {};
  }

  /**
   * The part that a selection points at, or null.
   * @param {Record<string, any>} chosen
   * @returns {Place | null}
   */
  find(chosen) {
    return null;
  }

  /** Where the arrow keys begin. @returns {Place} */
  first() {
    return [0, 0];
  }

  /**
   * The part that an arrow key leads to.
   * @param {Place} from
   * @param {number[]} by rows down and columns to the right
   * @returns {Place}
   */
  step([row, col], [down, right]) {
    const { rows, cols } = this.size();
    const clip = (x, most) => Math.min(Math.max(x, 0), most - 1);
    return [clip(row + down, rows), clip(col + right, cols)];
  }

  /**
   * The part under the pointer.
   * @returns {Place | null}
   */
  placeAt(event) {
    const mark = event.target.closest?.("[data-at]");
    return mark && this.contains(mark) ? mark.dataset.at.split(",").map(Number) : null;
  }

  /** Its own marks, without those of views inside it. @returns {any[]} */
  marks(css) {
    return [...this.querySelectorAll(css)].filter(this.#mine);
  }

  /** The first of its own marks, or null. */
  mark(css) {
    return this.marks(css)[0] ?? null;
  }

  /**
   * Show that a part is peeked at (`uh-at`), kept (`uh-kept`) or linked (`uh-linked`).
   * @param {Place | null} place
   * @param {string} how
   */
  light(place, how) {
    for (const old of this.marks(`.${how}`)) old.classList.remove(how);
    if (!place) return;
    const [row, col] = place;
    const query =
      row === null ? `[data-at$=",${col}"]` : col === null ? `[data-at^="${row},"]` : `[data-at="${row},${col}"]`;
    for (const mark of this.marks(query)) mark.classList.add(how);
  }

  // ---- the frame ---------------------------------------------------------------------------

  render() {
    if (!this.view) return nothing;
    try {
      return this.frame(tame(this.view));
    } catch (problem) {
      console.error(`underhood: a ${this.kind} view could not be drawn`, problem);
      return this.fallback ?? html`<p class="uh-note">This view could not be drawn: ${problem.message}</p>`;
    }
  }

  frame(view) {
    this.setAttribute("role", "group");
    this.setAttribute("aria-label", view.title || view.kind);
    const seen = this.shaped(view);
    const { control } = seen;
    const [shown, beside] = control ? shareScale(seen, control) : [seen, null];
    this.drawn = rescaled(this.log ? { ...shown, log: true } : shown);
    const body = html`${this.picture(this.drawn)}${this.#readout()}${this.#numbers(view)}`;
    const wide =
      (view.kind === "grid" && view.cols.length > 8) || ["tokens", "table", "graph"].includes(view.kind);
    return html`${this.nested ? nothing : tools(this)}${this.caption(view)}${control
      ? html`<div class="uh-pair${wide ? " uh-stacked" : ""}">
          <div class="uh-claim">${body}</div>
          ${this.besides(beside)}
        </div>`
      : body}${this.made(view)}`;
  }

  /** The control beside the claim. */
  besides(control) {
    return html`<div class="uh-control">
      <p class="uh-badge">control</p>
      ${this.nest("control", control, this.level + 1)}
    </div>`;
  }

  /** A view inside this one; the same element as long as its document is the same. */
  nest(name, view, level, { nested = true, bare = false } = {}) {
    const given = JSON.stringify(view);
    const known = this.parts.get(name);
    // Compared with what it was given: a reader may have changed what it draws since.
    const made = known?.given === given ? known : element(view, { level, told: this.told, nested, bare, given });
    if (nested) made.log = this.log; // claim and control, or A and B, are told by one scale
    this.parts.set(name, made);
    return made;
  }

  caption(view) {
    const title = view.title ? heading(this.level, view.title) : nothing;
    return html`${title}${view.about ? html`<p class="uh-about">${view.about}</p>` : nothing}`;
  }

  /** How the view was made: provenance that the page does not tell already, and the call. */
  made(view) {
    return howMade(view, this.told);
  }

  #readout() {
    return this.size() ? html`<p class="uh-readout" aria-live="polite"><span></span></p>` : nothing;
  }

  #numbers(view) {
    if (this.bare || this.isReadable(view)) return nothing;
    const tables = flatten({ ...view, control: undefined });
    const cells = tables.reduce((sum, { header, rows }) => sum + header.length * rows.length, 0);
    if (cells > HIDDEN_CELLS)
      return html`<p class="uh-hidden">${view.title || view.kind}: the numbers are too many for a table here (${cells} cells); save as CSV.</p>`;
    return tables.map(({ title, header, rows }) => {
      const caption = `${title || view.kind}: the numbers`;
      return html`<div class="uh-hidden">
        <table>
          <caption>${caption}</caption>
          <thead><tr>${header.map((name) => html`<th scope="col">${tokenHtml(name)}</th>`)}</tr></thead>
          <tbody>${rows.map((row) => html`<tr>${row.map((c) => html`<td>${written(c)}</td>`)}</tr>`)}</tbody>
        </table>
      </div>`;
    });
  }

  // ---- pointing ----------------------------------------------------------------------------

  #mine = (node) => node.closest(".uh-view") === this;

  #acts = {
    pointermove: (event) => {
      if (event.pointerType === "touch" || !this.#mine(event.target)) return;
      this.peek(this.placeAt(event));
    },
    pointerleave: () => this.peek(null),
    click: (event) => {
      if (!this.#mine(event.target) || event.target.closest(CONTROLS)) return;
      const place = this.size() && this.placeAt(event);
      if (place) this.#take(place, event);
    },
    keydown: (event) => this.#key(event),
  };

  #key(event) {
    const size = this.size();
    if (!size || !this.#mine(event.target) || event.target.closest(CONTROLS))
      return;
    const step = STEPS[event.key];
    if (!step && event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    if (!step) {
      if (this.peeked) this.#take(this.peeked, event);
      return;
    }
    const from = this.peeked ?? this.kept;
    const next = from ? this.step(from, step) : this.first();
    this.peek(next);
    this.querySelector(`[data-at="${next}"]`)?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  /** Look at one part for as long as the pointer is on it. */
  peek(place) {
    if (String(place) === String(this.peeked)) return;
    const had = this.peeked;
    this.peeked = place;
    this.light(place, "uh-at");
    this.tell();
    this.dispatchEvent(new CustomEvent("uh-point", { detail: place, bubbles: true }));
    if (place) selection.set({ ...this.spot(...place), from: this });
    else if (had && selection.get().from === this) selection.set({});
  }

  /** A click or Enter; with Shift a part is added to those that a kind keeps. */
  #take(place, event) {
    if (event.shiftKey) this.add(place);
    else this.keep(place);
  }

  /** Add a part to those kept, in a kind that keeps several. */
  add(place) {
    this.keep(place);
  }

  /** Keep one part until Esc, or until another is clicked. */
  keep(place) {
    this.kept = place;
    this.peeked = null;
    this.light(null, "uh-at");
    this.light(place, "uh-kept");
    const detail = { kind: this.kind, row: place[0], col: place[1], ...this.spot(...place) };
    selection.set({ ...this.spot(...place), from: this }, { lock: true });
    this.tell();
    this.dispatchEvent(new CustomEvent("uh-select", { detail, bubbles: true, composed: true }));
  }

  /** Another view selects something: show the same thing here. */
  follow(chosen) {
    if (!this.view || !this.hasUpdated || !this.size()) return;
    const mine = chosen.from === this;
    if (!mine || !chosen.locked) this.kept = null;
    this.light(mine ? null : this.find(chosen), "uh-linked");
    this.light(this.kept, "uh-kept");
    this.tell();
  }

  /** The line below the picture: what is peeked at, else kept, else what can be done. */
  tell() {
    const line = this.mark(".uh-readout > span");
    if (!line) return;
    const place = this.peeked ?? this.kept;
    line.parentElement.classList.toggle("uh-idle", !place);
    line.textContent = place
      ? tame(this.say(...place)) + (this.peeked ? "" : " · kept; Esc frees")
      : this.hint;
  }

  /** What can be done, while nothing is pointed at. */
  get hint() {
    return "hover to look, click to keep, arrow keys to move";
  }

  /** What is drawn anew, or is new on the page, shows what is selected already. */
  updated(changed) {
    this.follow(selection.get());
  }
}
