/** Views under one title; folded ones are drawn when the reader opens them, or prints. */
import { html, nothing } from "lit";
import { heading } from "../core/about.js";
import { ViewElement } from "../core/element.js";

export class Group extends ViewElement {
  static readable = true;
  static saves = ["CSV", "JSON"];
  static properties = { opened: { state: true } };

  constructor() {
    super();
    this.opened = false;
    this.print = () => (this.opened = true);
  }

  connectedCallback() {
    super.connectedCallback();
    addEventListener("beforeprint", this.print);
  }

  disconnectedCallback() {
    super.disconnectedCallback();
    removeEventListener("beforeprint", this.print);
  }

  frame(view) {
    this.setAttribute("role", "group");
    this.setAttribute("aria-label", view.title || "details");
    const label = view.title || "details";
    const inner = () => [
      ...view.views.map((part, i) => this.nest(i, part, this.level + 1, { nested: false })),
      view.control ? this.besides(view.control) : nothing,
      this.made(view),
    ];
    const about = view.about ? html`<p class="uh-about">${view.about}</p>` : nothing;
    if (!view.folded) return html`${this.caption(view)}${inner()}`;
    const count = `${view.views.length} view${view.views.length === 1 ? "" : "s"}`;
    return html`<details class="uh-folded" @toggle=${(e) => (this.opened ||= e.target.open)}>
      <summary>${heading(this.level, label)}<span class="uh-count">${count}</span></summary>
      ${this.opened ? [about, ...inner()] : nothing}
    </details>`;
  }
}
