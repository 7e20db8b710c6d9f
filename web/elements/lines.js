/** Curves over common, equally spaced labels (`view/draw_chart.py`). */
import { ViewElement } from "../core/element.js";
import { chart, cursor, pointUnder, sayPoint, thinned } from "../core/curves.js";
import { Axis } from "../core/selection.js";
import { visible } from "../core/tokens.js";

/** What curves over labels and over steps share: the x axis can be pointed at. */
export class Curves extends ViewElement {
  /** Where a point stands, in percent of the width. @param {number} i */
  place(i) {
    return i;
  }

  get area() {
    return this.mark(".uh-area");
  }

  placeAt(event) {
    const area = event.target.closest(".uh-area");
    return area ? [0, pointUnder(event, area, this.size().cols, this.place)] : null;
  }

  light(at, how) {
    cursor(this.area, how, at ? this.place(at[1]) : null);
  }
}

export class Lines extends Curves {
  picture(view) {
    const n = view.x.length;
    this.axis = new Axis(view.x_name, view.x);
    this.place = (i) => 2 + 96 * (n > 1 ? i / (n - 1) : 0.5);
    return chart(view, this.place, thinned(view.x).map(([i, text]) => [this.place(i), text]));
  }

  size() {
    return this.view.x.length ? { rows: 1, cols: this.view.x.length } : null;
  }

  say(row, i) {
    const name = `${this.view.x_name ?? ""} ${visible(this.view.x[i])}`.trimStart();
    return sayPoint(this.drawn, i, name);
  }

  spot(row, i) {
    return this.axis.spot(i);
  }

  find(chosen) {
    const at = this.axis.find(chosen);
    return at === null ? null : [0, at];
  }
}
