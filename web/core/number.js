/** How numbers are written; the rules of `view/number.py`. */

export const MINUS = "\u2212";
export const NONE = "\u2013";

/** Decimals that give the largest value three digits; -1 asks for powers of ten. */
export function decimalsFor(values) {
  let top = 0;
  for (const v of values) if (v !== null && v !== undefined) top = Math.max(top, Math.abs(v));
  if (top === 0) return 0;
  const order = Math.floor(Math.log10(top) + 1e-9);
  return order < -3 || order > 5 ? -1 : Math.min(4, Math.max(0, 2 - order));
}

/** Exact halves go to the even digit in Python, and up in JavaScript. */
function halfEven(text, exact, digits) {
  const dot = exact.indexOf(".");
  const below = exact.slice(0, digits ? dot + 1 + digits : dot);
  const half = /^50*$/.test(exact.slice(dot + 1 + digits));
  return half && Number(below.at(-1)) % 2 === 0 ? below : text;
}

/** `toFixed`, rounded as in Python. */
export function fixed(value, decimals) {
  const text = value.toFixed(decimals);
  // Most numbers are no halves, and large ones have no decimals.
  if (!value.toFixed(decimals + 1).endsWith("5") || Math.abs(value) >= 1e21) return text;
  return halfEven(text, value.toFixed(60), decimals);
}

/** Mantissa and exponent, rounded as in Python. @returns {[string, number]} */
function scientific(size, digits) {
  const [mantissa, power] = size.toExponential(digits).split("e");
  const [exact, at] = size.toExponential(60).split("e");
  return [at === power ? halfEven(mantissa, exact, digits) : mantissa, Number(power)];
}

/** One number as text; `+` only when `signed`, zero without sign, a dash when there is none. */
export function show(value, decimals, signed = true) {
  if (value === null || value === undefined) return NONE;
  const size = Math.abs(value);
  let text = fixed(size, Math.max(decimals, 0));
  if (decimals < 0 && value) {
    const [mantissa, power] = scientific(size, 1);
    text = `${mantissa}\u00d7${powerText(power)}`;
  } else if (Number(text) === 0) return text;
  return (value < 0 ? MINUS : signed ? "+" : "") + text;
}

/** A power of ten: `10⁻⁵`. */
export const powerText = (power) =>
  "10" + String(power).replace(/[-\d]/g, (c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]));

/** Decimals that tell neighbouring ticks apart. */
export const stepDecimals = (ticks) =>
  Math.max(0, ...ticks.map((t) => (fixed(t, 6).replace(/0+$/, "").split(".")[1] ?? "").length));

/** Round numbers from at or below `low` to at or above `high`. */
export function niceTicks(low, high, most = 6) {
  const rough = (high - low) / Math.max(most - 1, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.ceil(high / step - 1e-9);
  const ticks = [];
  for (let i = first; i <= last; i += 1) ticks.push(Number((i * step).toPrecision(13)));
  return ticks;
}

/** A number in the format of a table column (`+.2f`, `.1%`, `,d`, `g`); null: it does not fit. */
export function formatted(value, format) {
  const match = /^(\+?)(,?)(?:\.(\d+))?([defg%]?)$/.exec(format);
  if (!match) return null;
  const [, plus, comma, digits, type] = match;
  if (type === "d" && (digits !== undefined || !Number.isInteger(value))) return null;
  const size = Math.abs(value);
  const places = digits === undefined ? 6 : Number(digits);
  let text;
  if (type === "d") text = String(size);
  else if (type === "f") text = fixed(size, places);
  else if (type === "%") text = `${fixed(size * 100, places)}%`;
  else if (type === "e") text = exponent(scientific(size, places));
  else if (type === "" && digits === undefined) text = String(size);
  else text = general(size, places || 1);
  if (comma) text = text.replace(/^\d+/, (whole) => whole.replace(/\B(?=(\d{3})+$)/g, ","));
  return (value < 0 || Object.is(value, -0) ? MINUS : plus) + text;
}

/** Python writes at least two digits of exponent. */
const exponent = ([mantissa, power]) =>
  `${mantissa}e${power < 0 ? MINUS : "+"}${String(Math.abs(power)).padStart(2, "0")}`;

function general(size, digits) {
  if (size === 0) return "0";
  const [mantissa, power] = scientific(size, digits - 1);
  if (power >= -4 && power < digits) return trimmed(fixed(size, Math.max(digits - 1 - power, 0)));
  return exponent([trimmed(mantissa), power]);
}

const trimmed = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
