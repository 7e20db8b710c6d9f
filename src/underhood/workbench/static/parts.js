/** Pieces that all pages are made of. */
import { element, html, nothing } from "/static/underhood.mjs";
import { post } from "./api.js";
import { go, state, tell } from "./state.js";

// Views ------------------------------------------------------------------------------------------

const drawn = new WeakMap();

/** A view document as its element; the same document keeps its element. */
export function view(document_, level = 3) {
  if (!document_) return nothing;
  if (!drawn.has(document_)) drawn.set(document_, element(document_, { level }));
  return drawn.get(document_);
}

/** A part of a job: its view, or why there is none. */
export const part = (one, level = 3) =>
  one.refused
    ? html`<section class="wb-refusal"><h3>${one.title}</h3>${problem(one.refused)}</section>`
    : view(one.view, level);

/** A section of a report: its answer, then what shows it, folded where it is not the first thing. */
export function evidence({ answer, folded, views }) {
  const shown = views.map((one) => view(one));
  return html`${answer ? html`<p class="wb-answer">${answer}</p>` : nothing}
    ${folded ? html`<details class="wb-more"><summary>Show the evidence</summary>${shown}</details>` : shown}`;
}

// Errors and progress -----------------------------------------------------------------------------

/** An error in its four parts. */
export function problem(error) {
  if (!error) return nothing;
  // What has lines is a drawing of tokens, one below the other.
  const row = (name, text) => (text ? html`<dt>${name}</dt><dd class=${text.includes?.("\n") ? "wb-drawn" : ""}>${text}</dd>` : nothing);
  return html`<div class="wb-problem" role="alert">
    <p><strong>${error.what}</strong></p>
    <dl>${row("Given", error.given)}${row("Because", error.why)}${row("Instead", error.do)}</dl>
  </div>`;
}

const SAYS = {
  asking: "asking the server",
  queued: "waiting",
  running: "running",
  done: "done",
  cancelled: "cancelled",
};

/** How far a task is, the button that stops it, and what it left. */
export function progress(task) {
  if (task.state === "empty") return nothing;
  if (task.state === "failed") return problem(task.error);
  if (task.state === "forgotten")
    return html`<p class="wb-kept" role="status">The server no longer holds this run.
      ${task.result ? open(task.result, "Open what was found") : "Run it again to see it."}</p>`;
  const counted = task.state === "running" && task.total > 0;
  const far = counted ? `${task.done} of ${task.total}` : task.state === "running" && task.passes > 1 ? `${task.passes} forward passes` : "";
  const words = [SAYS[task.state], task.busy ? task.note : "", far];
  const left = task.state === "done" && task.result;
  return html`<div class="wb-progress wb-${task.state}" role="status">
    ${counted
      ? html`<progress max=${task.total} value=${task.done} aria-label="Progress"></progress>`
      : task.busy
        ? html`<progress aria-label="Progress"></progress>`
        : nothing}
    <span>${words.filter(Boolean).join(" · ")}</span>
    ${task.busy ? html`<button type="button" class="wb-quiet" @click=${() => task.cancel()}>Cancel</button>` : nothing}
    ${left ? open(task.result, "Kept among the results") : nothing}
  </div>`;
}

const open = (id, words) => html`<button type="button" class="wb-link" @click=${() => go("results", { open: id, compare: null })}>${words}</button>`;

/**
 * The button that starts a page's work, what stands around it, and how far the work is.
 * @param {string} label
 * @param {any} task
 * @param {() => void} act
 * @param {boolean} disabled
 * @param {{before?: any, beside?: any}} around
 */
export const run = (label, task, act, disabled = false, { before = nothing, beside = nothing } = {}) => html`<div class="wb-actions">
    ${before}<button type="submit" class="wb-run" ?disabled=${disabled} @click=${(event) => {
      event.preventDefault();
      act();
    }}>${label}</button>${beside} ${progress(task)}</div>`;

// Prompts ----------------------------------------------------------------------------------------

const cut = new Map(); // model and text -> what the server said of its tokens
const asked = new Set();

/** What is known of a text's tokens; asked for when it has stood there for a moment. */
function tokens(text) {
  const key = `${state.model}\n${text}`;
  if (text && !cut.has(key) && !asked.has(key)) {
    asked.add(key);
    setTimeout(() => count(key, text), 200);
  }
  return cut.get(key);
}

async function count(key, text) {
  const shown = [...document.querySelectorAll("textarea")].some((area) => area.value === text);
  const found = shown && (await post("/api/tokens", { model: state.model, text }).catch(() => null));
  asked.delete(key);
  if (!found) return; // typed on, or asked again at the next drawing
  if (cut.size > 200) cut.clear();
  cut.set(key, found);
  tell();
}

/** A prompt with its tokens below. */
export function prompt(label, value, change, { hint = "", required = true, rows = 2 } = {}) {
  const text = typeof value === "string" ? value : "";
  const id = `wb-${label.toLowerCase().replace(/\W+/g, "-")}`;
  return html`<div class="wb-field wb-wide">
    <label for=${id}>${label}${hint ? html` <small>${hint}</small>` : nothing}</label>
    <textarea id=${id} rows=${rows} spellcheck="false" dir="auto" ?required=${required} .value=${text}
      @input=${(e) => change(e.target.value)}></textarea>
    ${pieces(text)}
  </div>`;
}

function pieces(text) {
  const found = tokens(text);
  if (!text || !found) return html`<p class="wb-pieces">${text ? "…" : ""}</p>`;
  const over = found.context && found.count > found.context;
  const unknown = found.unknown.length;
  return html`<p class="wb-pieces ${over ? "wb-over" : ""}">
    ${found.count} token${found.count === 1 ? "" : "s"}${found.context ? ` of ${found.context}` : ""}
    ${over ? html`<strong>: too long for this model</strong>` : nothing}
    ${unknown ? html`<strong>, ${unknown} unknown to this model</strong>` : nothing}
    ${found.count <= 60
      ? html`<span aria-hidden="true">${found.strings.map((s, i) =>
          html`<i class=${found.unknown.includes(i) ? "wb-unknown" : ""} title="token ${found.ids[i]}">${s.replace(/\n/g, "⏎").replace(/ /g, "·")}</i>`)}</span>`
      : nothing}
  </p>`;
}

/**
 * One line of text.
 * @param {string} label
 * @param {any} value
 * @param {(text: string) => void} change
 * @param {{hint?: string, list?: string, type?: string, min?: any, max?: any, step?: any}} options
 */
export function line(label, value, change, { hint = "", list = "", type = "text", min, max, step } = {}) {
  return html`<label class="wb-field"><span>${label}${hint ? html` <small>${hint}</small>` : nothing}</span>
    <input type=${type} .value=${value ?? ""} list=${list || nothing} min=${min ?? nothing} max=${max ?? nothing}
      step=${step ?? nothing} spellcheck="false" autocomplete="off" @input=${(e) => change(e.target.value)}></label>`;
}

/** A choice among a few, in one line. */
export function choice(label, value, options, change) {
  return html`<label class="wb-said"><span>${label}</span>
    <select @change=${(e) => change(e.target.value)}>
      ${options.map((o) => {
        const [key, text] = Array.isArray(o) ? o : [o, o];
        return html`<option value=${key} .selected=${key === value}>${text}</option>`;
      })}
    </select></label>`;
}

/** Example prompts of the model; choosing one fills the form. */
export function examples(facts, chosen, fill) {
  if (!facts?.examples?.length) return nothing;
  const name = (e) => (e.task ? `${e.task.replaceAll("_", " ")}: ` : "") + e.prompt;
  return html`<label class="wb-field wb-wide wb-examples"><span>Example</span>
    <select @change=${(e) => e.target.value !== "" && fill(facts.examples[Number(e.target.value)])}>
      <option value="" .selected=${!facts.examples.some((e) => e.prompt === chosen)}>your own</option>
      ${facts.examples.map((e, i) => html`<option value=${i} .selected=${e.prompt === chosen}>${name(e)}</option>`)}
    </select></label>`;
}

/**
 * Concrete addresses of a model's sites, for a list to choose from.
 * @param {any} facts
 * @param {(name: string) => boolean} keep
 */
export function addresses(facts, keep = () => true) {
  const found = [];
  for (const { site } of facts?.sites ?? []) {
    const match = /^(.*)\.([\d,-]+)$/.exec(site);
    const name = (match ? match[1] : site).split(".").pop();
    if (!keep(name)) continue;
    if (!match) found.push(site);
    else for (const n of spread(match[2])) found.push(`${match[1]}.${n}`);
  }
  return found;
}

function spread(words) {
  return words.split(",").flatMap((word) => {
    const [first, last = first] = word.split("-").map(Number);
    return Array.from({ length: last - first + 1 }, (_, i) => first + i);
  });
}

/** The head of a page: what it is for, in one line. */
export const head = (title, about) => html`<header class="wb-head"><h1>${title}</h1><p>${about}</p></header>`;
