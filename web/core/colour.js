/**
 * The colours of `view/colour.py`, and the limits that tie numbers to them.
 *
 * The tables themselves come from Python (`palette.json`, written by scripts/build_web.py), so a
 * cell has the same colour in the static page and here. The arithmetic is that of `limits_of` and
 * `indices`; a test in the browser compares the two. Only the logarithmic scale, a choice of the
 * reader, is here alone: it bends how values are spread over the colours, and moves neither zero nor
 * the ends.
 */
import table from "./palette.json";

export const MISSING = 255;
const LEVELS = 255;
const DEPTH = 99; // a hundredth of the limit still takes 15 % of the colours

/** Decoded once: 255 x 3 bytes per scale, low to high. */
const palettes = Object.fromEntries(
  Object.entries(table.palettes).map(([scale, text]) => [
    scale,
    Uint8Array.from(atob(text), (c) => c.charCodeAt(0)),
  ]),
);

/** `Array.prototype.flat` over numbers only; missing values are left out. */
function finite(values) {
  const found = [];
  for (const value of values ?? []) {
    if (Array.isArray(value)) for (const v of value) v !== null && found.push(v);
    else if (value !== null) found.push(value);
  }
  return found;
}

/**
 * What the two ends of a scale mean.
 *
 * @typedef {{scale: string, low: number, high: number, clipped: number, extreme: number, log: boolean}} Limits
 * @param {any} values numbers, or rows of numbers; null is missing
 * @param {string} scale diverging, sequential or probability
 * @param {number | null} limit the magnitude at the end; null takes the robust one
 * @param {boolean} log spread the colours logarithmically (probabilities stay as they are)
 * @returns {Limits}
 */
export function limitsOf(values, scale, limit = null, log = false) {
  const data = finite(values);
  let extreme = 0;
  let least = Infinity;
  for (const v of data) {
    if (Math.abs(v) > Math.abs(extreme)) extreme = v;
    if (v < least) least = v;
  }
  let low = 0;
  let high = 1;
  if (scale !== "probability") {
    if (limit === null && data.length) {
      const sizes = Float64Array.from(data, Math.abs).sort();
      limit = sizes[Math.ceil((table.robust / 100) * (sizes.length - 1))] || Math.abs(extreme);
    }
    high = limit || 1;
    low = scale === "diverging" || least < 0 ? -high : 0;
  }
  const slack = 1e-9 * (high - low);
  let clipped = 0;
  for (const v of data) if (v > high + slack || v < low - slack) clipped += 1;
  return { scale, low, high, clipped, extreme, log: log && canLog(scale) };
}

/** The limits of a strip or grid. */
export const limitsFor = (view) =>
  limitsOf(view.values ?? [], view.scale ?? "diverging", view.limit ?? null, view.log);

/** Whether a scale has a logarithmic form: probabilities are compared between views as they are. */
export const canLog = (scale) => scale !== "probability";

/** How far along its colours a size stands, 0 to 1, on the logarithmic scale. */
const bent = (size) => Math.log1p(DEPTH * size) / Math.log1p(DEPTH);

/** The size, in shares of the limit, that has half the colour on the logarithmic scale. */
export const HALF_COLOUR = Math.expm1(Math.log1p(DEPTH) / 2) / DEPTH;

/** Where a value stands between the ends, 0 to 1; beyond them, if it lies there. */
function shareOf(value, { low, high, log }) {
  if (!log) return (value - low) / (high - low);
  const share = Math.sign(value) * bent(Math.abs(value) / high);
  return low < 0 ? (1 + share) / 2 : share;
}

/** Halves go to the even neighbour, as in numpy. */
function rint(x) {
  const r = Math.round(x);
  return r - x === 0.5 && r % 2 ? r - 1 : r;
}

/** Palette index of one value; null is `MISSING`. */
export function indexOf(value, limits) {
  if (value === null) return MISSING;
  return Math.min(Math.max(rint(shareOf(value, limits) * (LEVELS - 1)), 0), LEVELS - 1);
}

function hex(scale, index) {
  const p = palettes[scale];
  const channel = (k) => p[3 * index + k].toString(16).padStart(2, "0");
  return `#${channel(0)}${channel(1)}${channel(2)}`;
}

/** `#rrggbb` of one finite value. */
export const colourOf = (value, limits) => hex(limits.scale, indexOf(value, limits));

/** Black or white, whichever reads better on `#rrggbb`. */
export function ink(background) {
  const [r, g, b] = [1, 3, 5].map((i) => {
    const c = parseInt(background.slice(i, i + 2), 16) / 255;
    return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b < 0.179 ? "#ffffff" : "#000000";
}

/** The style of a coloured cell or chip. */
export function paint(value, limits) {
  if (value === null) return undefined;
  const back = colourOf(value, limits);
  return `background:${back};color:${ink(back)}`;
}

/** The map as a CSS gradient, for legends. */
export function gradient(scale, stops = 9) {
  const at = Array.from({ length: stops }, (_, i) => rint((i * (LEVELS - 1)) / (stops - 1)));
  return `linear-gradient(90deg,${at.map((i) => hex(scale, i)).join(",")})`;
}

/** Paint a matrix on a canvas, one pixel per cell; missing cells stay transparent. */
export function paintMatrix(canvas, matrix, limits) {
  const rows = matrix.length;
  const cols = rows ? matrix[0].length : 0;
  if (!rows || !cols) return;
  canvas.width = cols;
  canvas.height = rows;
  const palette = palettes[limits.scale];
  const image = new ImageData(cols, rows);
  const out = image.data;
  let at = 0;
  for (const row of matrix) {
    for (const value of row) {
      const index = indexOf(value, limits);
      if (index !== MISSING) {
        out[at] = palette[3 * index];
        out[at + 1] = palette[3 * index + 1];
        out[at + 2] = palette[3 * index + 2];
        out[at + 3] = 255;
      }
      at += 4;
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}
