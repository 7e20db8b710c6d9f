/** A place for a view that is still being made: empty, queued, running n of m, failed, or done. */
import { LitElement, html, nothing } from "lit";
import { element } from "../core/element.js";

/**
 * `panel.state = {phase, done, total, step, message, hint}`; `panel.view = document` ends it.
 * `phase` is one of empty, queued, running, failed, done.
 */
export class Panel extends LitElement {
  static properties = {
    state: { attribute: false },
    view: { attribute: false },
    level: { attribute: false },
  };

  constructor() {
    super();
    /** @type {Record<string, any>} */
    this.state = { phase: "empty" };
    this.view = null;
    this.level = 3;
  }

  createRenderRoot() {
    return this;
  }

  render() {
    const { phase = "empty", ahead, done, total, step, message, hint } = this.state ?? {};
    this.setAttribute("aria-busy", String(phase === "queued" || phase === "running"));
    if (this.view && (phase === "done" || phase === "empty")) return this.drawn();
    const told = {
      empty: message ?? "Nothing here yet.",
      queued: ahead ? `Waiting for ${ahead} other job${ahead === 1 ? "" : "s"}.` : "Waiting.",
      running: `${step ?? "Running"}${total ? `: ${done ?? 0} of ${total}` : " …"}`,
      failed: message ?? "This did not work.",
      done: message ?? "Done; there is nothing to show.",
    }[phase];
    const bar = phase === "running" && total ? html`<progress max=${total} .value=${done ?? 0}></progress>` : nothing;
    // What is there already stays to be read while more is on its way.
    return html`<div class="uh-state uh-is-${phase}" role=${phase === "failed" ? "alert" : "status"}><p>${told}</p>${bar}${hint ? html`<p class="uh-note">${hint}</p>` : nothing}</div>${this.view ? this.drawn() : nothing}`;
  }

  drawn() {
    if (this.shownView !== this.view) {
      this.shownView = this.view;
      this.shown = element(this.view, { level: this.level });
    }
    return this.shown;
  }
}
