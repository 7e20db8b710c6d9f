/** Curves: an SVG stretched to the width of the page, with every label in HTML around it. */
import { html, nothing, svg } from "lit";
import { share } from "../elements/bars.js";
import { decimalsFor, niceTicks, show, stepDecimals } from "./number.js";
import { lineSpan } from "./rescale.js";
import { tokenHtml, visible } from "./tokens.js";

const INKS = 6;
const DASHES = ["", "7 4", "2 4", "10 4 2 4", "4 3", "1 3"];

const y = (value, low, high) => 100 - share(value, low, high);

/** Stretches of consecutive indices that have a value. */
export function runs(values) {
  const found = [];
  values.forEach((value, i) => {
    if (value === null) return;
    if (found.length && found.at(-1).at(-1) === i - 1) found.at(-1).push(i);
    else found.push([i]);
  });
  return found;
}

function curve(line, index, place, low, high) {
  const ink = `uh-ink${index % INKS}`;
  const point = (values) => (i) => `${place(i).toFixed(2)} ${y(values[i], low, high).toFixed(2)}`;
  const shapes = [];
  if (line.low && line.high) {
    for (const run of runs(line.low.map((a, i) => (line.high[i] === null ? null : a)))) {
      const edge = [...run.map(point(line.high)), ...run.toReversed().map(point(line.low))];
      shapes.push(svg`<path class="uh-shade ${ink}" d="M${edge.join("L")}Z"></path>`);
    }
  }
  for (const run of runs(line.values)) {
    const points = run.map(point(line.values));
    shapes.push(svg`<path class="uh-line ${ink}" d="M${points.join("L")}" stroke-dasharray=${DASHES[index % DASHES.length] || nothing}></path>`);
    // A stroke of length zero with round ends is a dot that stretching cannot deform.
    if (line.values.length <= 60)
      shapes.push(svg`<path class="uh-dot ${ink}" d=${points.map((p) => `M${p}h0`).join("")}></path>`);
  }
  return shapes;
}

/**
 * A chart.
 * @param view with series, y_name, x_name, span
 * @param place index of a point -> percent of the width
 * @param ticks of the x axis: [percent, text]
 * @param extra vertical lines: [percent, text]
 */
export function chart(view, place, ticks, extra = []) {
  const [spanLow, spanHigh] = view.span ?? lineSpan(view);
  const levels = niceTicks(spanLow, spanHigh);
  const low = view.span ? levels[0] : Math.min(levels[0], spanLow);
  const high = view.span ? levels.at(-1) : Math.max(levels.at(-1), spanHigh);
  const decimals = Math.max(decimalsFor(levels), stepDecimals(levels));
  const numbers = levels.map((t) => show(t, decimals, false));
  const longest = Math.max(1, ...ticks.map(([, text]) => [...visible(text)].length));
  const crowded = ticks.length * (longest + 2) > 44;
  const told = `${view.title || "curves"}: ${view.y_name ?? ""} over ${view.x_name ?? ""} for ${view.series.map((s) => s.name).join(", ")}`;
  return html`<div class="uh-plot" style="--side:${Math.max(...numbers.map((n) => n.length)) + 1}ch">
      <p class="uh-yname">${view.y_name ?? ""}</p>
      <div class="uh-yticks">${levels.map((t, i) => html`<span style="top:${y(t, low, high).toFixed(2)}%">${numbers[i]}</span>`)}</div>
      <div class="uh-area" role="img" tabindex="0" aria-label=${told}><svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">${levels.map((t) => svg`<path class=${t === 0 ? "uh-zeroline" : "uh-rule"} d="M0 ${y(t, low, high).toFixed(2)}H100"></path>`)}${extra.map(([at]) => svg`<path class="uh-markline" d="M${at.toFixed(2)} 0V100"></path>`)}${view.series.map((line, i) => curve(line, i, place, low, high))}</svg>${extra.map(([at, text]) => html`<span class="uh-onset" style=${at < 70 ? `left:${at.toFixed(2)}%` : `right:${(100 - at).toFixed(2)}%`}>${text}</span>`)}</div>
      <div class="uh-xticks" aria-hidden="true">${ticks.map(([at, text], k) => html`<span class=${crowded && k % 2 ? "uh-odd" : nothing} style="left:${at.toFixed(2)}%">${tokenHtml(text)}</span>`)}</div>
      <p class="uh-xname">${view.x_name ?? ""}</p>
    </div>
    ${seriesLegend(view.series)}`;
}

function seriesLegend(series) {
  return html`<p class="uh-legend">${series.map((line, i) => {
    const known = line.values.filter((v) => v !== null);
    const last = known.length ? ` (last ${show(known.at(-1), decimalsFor(known), false)})` : "";
    const band = line.low ? ", band: its interval" : "";
    return html`<span><svg class="uh-sample" viewBox="0 0 28 12" aria-hidden="true"><path class="uh-line uh-ink${i % INKS}" d="M1 6H27" stroke-dasharray=${DASHES[i % DASHES.length] || nothing}></path></svg>${line.name}${last}${band}</span>`;
  })}</p>`;
}

/** Every series at one point in words. */
export function sayPoint(view, i, name) {
  const parts = view.series.map((line) => {
    const known = line.values.filter((v) => v !== null);
    return `${line.name} ${show(line.values[i], decimalsFor(known), false)}`;
  });
  return `${name}: ${parts.join(", ")} ${view.y_name ? `(${view.y_name})` : ""}`.trimEnd();
}

/** Thin evenly, so that labels do not touch. */
export function thinned(labels) {
  const longest = Math.max(1, ...labels.map((l) => [...visible(l)].length));
  const most = Math.min(Math.max(Math.floor(80 / (longest + 2)), 2), 25);
  const step = Math.ceil(labels.length / most) || 1;
  return labels.map((text, i) => [i, text]).filter(([i]) => i % step === 0);
}

/** Index of the point nearest to the pointer. */
export function pointUnder(event, area, n, place) {
  const box = area.getBoundingClientRect();
  const at = ((event.clientX - box.left) / box.width) * 100;
  let best = 0;
  for (let i = 1; i < n; i += 1)
    if (Math.abs(place(i) - at) < Math.abs(place(best) - at)) best = i;
  return best;
}

/** The vertical line at a point. */
export function cursor(area, how, percentAt) {
  area?.querySelector(`:scope > .uh-cursor.${how}`)?.remove();
  if (!area || percentAt === null) return;
  const line = document.createElement("span");
  line.className = `uh-cursor ${how}`;
  line.style.left = `${percentAt}%`;
  area.append(line);
}
