/**
 * The one selection that all views of a page share.
 *
 * Hovering *peeks*: the selection follows the pointer. A click *locks*: it stays, and other views
 * keep showing it, until Esc frees it or another click moves it. Beside `{layer, pos, head,
 * feature}` it tells how many positions its view had (`of`) and the token there (`token`), so that
 * views of another prompt do not light up a position that means something else in them.
 */

const EMPTY = Object.freeze({});

export class Selection {
  #now = EMPTY;
  #locked = false;
  #listeners = new Set();

  /** The selection; `locked` tells whether it stays. @returns {any} */
  get() {
    return { ...this.#now, locked: this.#locked };
  }

  /**
   * Select something, or free the selection with `null`.
   * A peek is ignored while something is locked.
   */
  set(partial, { lock = false } = {}) {
    if (this.#locked && !lock && partial !== null) return;
    this.#now = partial === null ? EMPTY : Object.freeze({ ...partial });
    this.#locked = lock && partial !== null;
    for (const listener of this.#listeners) listener(this.get());
  }

  /** Call `listener` with the selection after each change; returns what ends that. */
  subscribe(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }
}

export const selection = new Selection();

const AXES = {
  layer: "layer",
  pos: "pos",
  position: "pos",
  token: "pos",
  query: "pos",
  key: "pos",
  head: "head",
  feature: "feature",
};

/** What the name of a part says: `a9.h6` a head, `m3` a layer; and, in older files, `9.6`, `L9.H6`, `MLP 3`. */
export function named(label) {
  let match = /^[aL]?(\d+)\.[hH]?(\d+)$/.exec(label);
  if (match) return { layer: Number(match[1]), head: Number(match[2]) };
  match = /^[amL](\d+)\b|^(?:MLP|attn|layer)\s*(\d+)$/i.exec(label);
  return match ? { layer: Number(match[1] ?? match[2]) } : {};
}

/**
 * One labelled axis: index -> selection and back.
 * What an index is, the document says (`places`, as `{layer: [-1, 0, 1]}`); else the axis' name and
 * its labels do.
 */
export class Axis {
  constructor(name, labels, places = {}) {
    this.labels = labels;
    this.places = Object.entries(places);
    this.key = AXES[(name ?? "").toLowerCase().split(/[\s,(]/)[0]] ?? null;
  }

  /** What index `i` selects. */
  spot(i) {
    const label = this.labels[i];
    if (this.places.length) {
      const known = this.places.filter(([, at]) => at[i] !== null);
      const found = Object.fromEntries(known.map(([key, at]) => [key, at[i]]));
      return "pos" in found ? { ...found, token: label } : found;
    }
    if (this.key === "pos") return { pos: i, of: this.labels.length, token: label };
    const parsed = named(label);
    if (parsed.head !== undefined || !this.key) return parsed;
    const number = /-?\d+/.exec(label);
    return number ? { [this.key]: Number(number[0]) } : {};
  }

  /** The index that a selection points at, or null. */
  find(chosen) {
    if (this.key === "pos" && !this.places.length) {
      const { pos, of, token } = chosen;
      if (pos === undefined || pos >= this.labels.length) return null;
      const same = of === undefined || of === this.labels.length || this.labels[pos] === token;
      return same ? pos : null;
    }
    for (let i = 0; i < this.labels.length; i += 1)
      if (agrees(this.spot(i), chosen)) return i;
    return null;
  }
}

const KEYS = ["layer", "pos", "head", "feature"];

/** Whether a part is what is selected: every key that it has is the same there. */
export function agrees(spot, chosen) {
  const mine = KEYS.filter((key) => key in spot);
  return mine.length > 0 && mine.every((key) => spot[key] === chosen[key]);
}
