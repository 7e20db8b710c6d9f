/** Fair scales and readable numbers, before a view is drawn; the rules of `view/rescale.py`. */
import { limitsFor } from "./colour.js";
import { powerText } from "./number.js";

const SMALLEST = -3;
const LARGEST = 5;

const CURVES = ["lines", "timeline"];

const coloured = (view) => view.kind === "grid" || view.kind === "tokens";
const scaleOf = (view) => view.scale ?? "diverging";

/** Claim and control with common limits, where both draw the same kind of number. */
export function shareScale(claim, control) {
  if (coloured(claim) && coloured(control)) {
    const alike = scaleOf(claim) === scaleOf(control) && (claim.unit ?? "") === (control.unit ?? "");
    if (alike && (control.limit ?? null) === null)
      return [claim, { ...control, limit: limitsFor(claim).high }];
  }
  for (const { kinds, unit, spanOf } of [
    { kinds: ["bars"], unit: "unit", spanOf: barSpan },
    { kinds: CURVES, unit: "y_name", spanOf: lineSpan },
  ]) {
    const alike = kinds.includes(claim.kind) && kinds.includes(control.kind);
    const both = alike && !claim.span && !control.span;
    if (both && (claim[unit] ?? "") === (control[unit] ?? "")) {
      const span = spanOf(claim, control);
      return [{ ...claim, span }, { ...control, span }];
    }
  }
  return [claim, control];
}

/** The view in powers of ten of its unit, if its numbers are very small or very large. */
export function rescaled(view) {
  if (coloured(view) && view.values) {
    const { high } = limitsFor(view);
    const power = powerOf(scaleOf(view) === "probability" ? 0 : high);
    if (!power) return view;
    const values = view.values.map((v) => (Array.isArray(v) ? list(v, power) : over(v, power)));
    return { ...view, values, limit: over(high, power), unit: unitOf(view.unit ?? "", power) };
  }
  if (view.kind !== "bars" && !CURVES.includes(view.kind)) return view;
  const span = view.span ?? (view.kind === "bars" ? barSpan(view) : lineSpan(view));
  const power = powerOf(Math.max(...span.map(Math.abs)));
  if (!power) return view;
  if (view.kind === "bars")
    return {
      ...view,
      values: list(view.values, power),
      total: over(view.total ?? null, power),
      baseline: view.baseline?.map((pair) => list(pair, power)),
      span: list(span, power),
      unit: unitOf(view.unit ?? "", power),
    };
  return {
    ...view,
    series: view.series.map((line) => ({
      ...line,
      values: list(line.values, power),
      low: line.low && list(line.low, power),
      high: line.high && list(line.high, power),
    })),
    span: view.span && list(view.span, power),
    y_name: unitOf(view.y_name ?? "", power),
  };
}

/** The ends of an axis that holds every bar and baseline of the views, and zero. */
export function barSpan(...views) {
  const [low, high] = ends(
    views.flatMap((v) => [...v.values, ...(v.baseline ?? []).flat()]),
    [0],
  );
  return high > low ? [low, high] : [0, 1];
}

/** The ends of a y axis that holds every line and band of the views. */
export function lineSpan(...views) {
  const [low, high] = ends(
    views.flatMap((v) => v.series.flatMap((s) => [...s.values, ...(s.low ?? []), ...(s.high ?? [])])),
    [],
  );
  const margin = 0.5 * Math.abs(low) || 0.5;
  return high > low ? [low, high] : [low - margin, high + margin];
}

function ends(values, start) {
  let low = start[0] ?? Infinity;
  let high = start[0] ?? -Infinity;
  for (const v of values) {
    if (v === null) continue;
    if (v < low) low = v;
    if (v > high) high = v;
  }
  return low <= high ? [low, high] : [0, 1];
}

function powerOf(top) {
  if (top === 0) return 0;
  const order = Math.floor(Math.log10(top) + 1e-9);
  return SMALLEST <= order && order <= LARGEST ? 0 : 3 * Math.floor(order / 3);
}

// Two steps, as 10 ** 308 and beyond would overflow for the smallest numbers there are.
function over(value, power) {
  if (value === null) return null;
  const half = Math.floor(power / 2);
  return value / 10 ** half / 10 ** (power - half);
}

const list = (values, power) => values.map((v) => over(v, power));
const unitOf = (unit, power) => (unit ? `${powerText(power)} ${unit}` : `× ${powerText(power)}`);
