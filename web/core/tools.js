/** The tools of a frame: scale of the colours, maximise, save as PNG, SVG, CSV or JSON, copy the call. */
import { html, nothing } from "lit";
import { toCsv } from "./flat.js";
import { toPng, toSvg } from "./svg.js";

const SCHEMA = "view/1";

/** The document of an element, as it was written where that is known. */
export function toJson(host) {
  if (host.source) return host.source;
  const { schema, ...rest } = host.view;
  return JSON.stringify({ schema: SCHEMA, ...rest });
}

const FORMATS = {
  PNG: { type: "image/png", make: toPng },
  SVG: { type: "image/svg+xml", make: toSvg },
  CSV: { type: "text/csv", make: (host) => toCsv(host.view) },
  JSON: { type: "application/json", make: toJson },
};

export function tools(host) {
  const offered = host.constructor.saves ?? Object.keys(FORMATS);
  return html`<div class="uh-tools" role="group" aria-label="Tools of ${host.view.title || host.kind}">
    ${host.view.python
      ? html`<button type="button" @click=${(e) => copy(e.currentTarget, host.view.python)}>copy Python</button>`
      : nothing}
    ${host.offersLog(host.drawn)
      ? html`<button type="button" class="uh-log" aria-pressed=${String(host.log)} title="Colours on a logarithmic scale, so that small values show" @click=${() => (host.log = !host.log)}>log</button>`
      : nothing}
    <details class="uh-menu" @focusout=${closeOutside}>
      <summary>save</summary>
      <div>${offered.map((format) => html`<button type="button" @click=${(e) => save(e, host, format)}>${format}</button>`)}</div>
    </details>
    <button type="button" class="uh-max" aria-pressed="false" title="Fill the window (Esc leaves)" @click=${(e) => maximise(host, e.currentTarget)}>⤢<span class="uh-hidden">Fill the window</span></button>
  </div>`;
}

function closeOutside(event) {
  const menu = event.currentTarget;
  if (!menu.contains(event.relatedTarget)) menu.open = false;
}

async function save(event, host, format) {
  event.currentTarget.closest("details").open = false;
  const { type, make } = FORMATS[format];
  const made = await make(host);
  const blob = made instanceof Blob ? made : new Blob([made], { type });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${fileName(host)}.${format.toLowerCase()}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** The title as a file name. */
const fileName = (host) =>
  (host.view.title || host.kind).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60).toLowerCase() ||
  host.kind;

async function copy(button, text) {
  const was = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "copied";
  } catch {
    button.textContent = "copy it below"; // the page may not touch the clipboard
    button.closest(".uh-view").querySelector(".uh-made")?.setAttribute("open", "");
  }
  setTimeout(() => (button.textContent = was), 1500);
}

/** The view over the whole window and back. The top layer needs no place in the page to move to. */
function maximise(host, button) {
  const open = host.hasAttribute("popover");
  if (open) {
    host.hidePopover();
    host.removeAttribute("popover");
  } else {
    host.setAttribute("popover", "auto");
    host.showPopover();
    const back = (event) => {
      if (event.newState !== "closed") return;
      host.removeEventListener("toggle", back);
      host.removeAttribute("popover");
      button.setAttribute("aria-pressed", "false");
    };
    host.addEventListener("toggle", back);
  }
  button.setAttribute("aria-pressed", String(!open));
  button.focus();
}
