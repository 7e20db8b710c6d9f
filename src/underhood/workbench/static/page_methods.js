/** Methods: every method of the library as a form, with its card. */
import { html, nothing } from "/static/underhood.mjs";
import { get, Task, told } from "./api.js";
import { head, part, problem, progress, run } from "./parts.js";
import { of, put, state, tell } from "./state.js";

export const title = "Methods";
export const question = "Which tools are there?";

const task = new Task(tell);
const asking = new Task(tell);
const cards = new Map(); // by model
let failure = null;
let asked = null;

const FAMILIES = {
  read: "Read", locate: "Locate", decompose: "Decompose", steer: "Steer", compare: "Compare",
  develop: "Develop", vision: "Vision",
};

export function draw(facts) {
  need();
  const said = of("methods");
  const all = cards.get(state.model);
  return html`${head("Methods", "Every method of the library, as a form made from its own signature. What this model does not offer says why.")}
    ${problem(failure)} ${all ? nothing : progress(asking)}
    ${all ? html`<div class="wb-split"><nav class="wb-catalogue" aria-label="Methods">${catalogue(all, said)}</nav>
      <div>${chosen(facts, all.find((m) => m.name === (said.method ?? all[0]?.name)), said)}</div></div>` : nothing}`;
}

async function need() {
  if (asked === state.model) return;
  const mine = (asked = state.model);
  try {
    const { methods } = await get(`/api/methods?model=${encodeURIComponent(mine)}`);
    if (methods) cards.set(mine, methods);
    else asking.start({ do: "methods", model: mine }, (p) => p.methods && cards.set(mine, p.methods));
  } catch (why) {
    failure = told(why);
  }
  tell();
}

function catalogue(all, said) {
  const wanted = (said.filter ?? "").toLowerCase();
  const fits = (m) => `${m.name} ${m.summary}`.toLowerCase().includes(wanted);
  return html`<label class="wb-field"><span>Find</span><input type="search" .value=${said.filter ?? ""} @input=${(e) => put({ filter: e.target.value })}></label>
    ${Object.entries(FAMILIES).map(([family, name]) => {
      const shown = all.filter((m) => m.family === family && fits(m));
      return shown.length ? html`<h2>${name}</h2><ul>${shown.map((m) => html`<li><a href="#" class=${m.refused ? "wb-refused" : ""}
        aria-current=${m.name === (said.method ?? all[0].name) ? "true" : nothing} title=${m.summary} @click=${(e) => {
          e.preventDefault();
          put({ method: m.name, options: {} });
        }}>${m.name.replaceAll("_", " ")}</a></li>`)}</ul>` : nothing;
    })}`;
}

function chosen(facts, card, said) {
  if (!card) return nothing;
  const mine = task.of === card.name;
  return html`<section class="wb-card"><h2>${card.name.replaceAll("_", " ")}</h2>
    <p class="wb-summary">${card.summary}</p>
    ${card.refused ? html`<div class="wb-problem"><p><strong>This model does not offer it.</strong> ${card.refused}</p></div>` : nothing}
    ${form(facts, card, said)}
    ${mine ? progress(task) : nothing}
    ${mine ? task.named("view").map((one) => part(one)) : nothing}
    ${mine && task.result ? html`<p class="wb-kept">Kept among the results as <code>${task.result}</code>.</p>` : nothing}
    <details class="wb-more"><summary>What it computes, its cost, its source, and when it misleads</summary>
      ${card.sections.map(([name, text]) => html`<h3>${name}</h3>${name === "Example" ? html`<pre class="uh-code">${text}</pre>` : html`<p class="wb-prose">${text}</p>`}`)}
    </details></section>`;
}

function form(facts, card, said) {
  const example = facts.examples[0] ?? {};
  const kinds = card.data.map((d) => d.kind);
  if (kinds.includes("")) return html`<p class="wb-about">It reads something that only Python can give; see the example below.</p>`;
  const pairs = kinds.includes("pairs");
  const needed = card.options.find((o) => o.required && o.control === "python");
  if (needed) return html`<p class="wb-about">It needs ${needed.name}, which only Python or the command line can give. ${needed.about}</p>`;
  const data = { prompts: example.prompt ?? "", contrasts: example.contrast ?? "", answers: example.answer ?? "", wrong: example.wrong ?? "", ...said.data };
  const area = (name, label, hint) => html`<label class="wb-field wb-wide"><span>${label} <small>${hint}</small></span>
    <textarea rows="2" dir="auto" spellcheck="false" .value=${data[name]} @input=${(e) => put({ data: { ...data, [name]: e.target.value } })}></textarea></label>`;
  return html`<form class="wb-form">
    ${kinds.includes("prompt") ? area("prompts", "Prompts", card.data.find((d) => d.kind === "prompt").about || "one per line") : nothing}
    ${pairs ? html`${area("prompts", "Prompts", "one per line")} ${area("contrasts", "Contrasts", "one for each prompt, of as many tokens")}
      <div class="wb-row">${area("answers", "Answers", "one token each")} ${area("wrong", "Held against", "one token each")}</div>` : nothing}
    ${card.options.length ? html`<details class="wb-more"><summary>${card.options.length} options</summary>
      <div class="wb-options">${card.options.map((o) => option(o, said.options ?? {}))}</div></details>` : nothing}
    <div class="wb-actions">${run("Run", task, () => start(card, data, kinds), Boolean(card.refused))}</div></form>`;
}

function start(card, data, kinds) {
  const lines = (text) => text.split("\n").filter((t) => t.trim());
  const pairs = kinds.includes("pairs");
  const options = Object.fromEntries(Object.entries(of("methods").options ?? {}).map(([k, v]) => [k, String(v)]));
  task.of = card.name;
  task.start({
    do: "method", model: state.model, name: card.name, options,
    prompts: pairs || kinds.includes("prompt") ? lines(data.prompts) : [],
    contrasts: pairs ? lines(data.contrasts) : [],
    answers: pairs ? lines(data.answers) : [],
    wrong: pairs ? lines(data.wrong) : [],
    other: kinds.includes("model") ? state.model : null,
  });
}

function option(o, said) {
  const value = said[o.name] ?? "";
  const set = (v) => put({ options: { ...said, [o.name]: v } });
  if (o.control === "python") return nothing;
  const usual = o.default === "" || o.default === null ? "none" : o.default;
  const input = {
    choice: () => html`<select @change=${(e) => set(e.target.value)}><option value="" .selected=${value === ""}>${usual} (default)</option>
      ${o.choices.filter((c) => c !== o.default).map((c) => html`<option .selected=${c === value}>${c}</option>`)}</select>`,
    switch: () => html`<select @change=${(e) => set(e.target.value)}><option value="" .selected=${value === ""}>${usual === "true" ? "yes" : "no"} (default)</option>
      <option value=${usual === "true" ? "false" : "true"} .selected=${value !== ""}>${usual === "true" ? "no" : "yes"}</option></select>`,
    number: () => html`<input type="number" step=${o.whole ? 1 : "any"} placeholder=${usual} .value=${value} @input=${(e) => set(e.target.value)}>`,
    text: () => html`<input placeholder=${usual} .value=${value} spellcheck="false" @input=${(e) => set(e.target.value)}>`,
  }[o.control];
  return html`<label class="wb-field" title=${o.type}><span>${o.name.replaceAll("_", " ")}${o.required ? " (needed)" : ""}</span>${input()}
    <small>${o.about}</small></label>`;
}
