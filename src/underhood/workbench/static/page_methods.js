/** Methods: every method of the library as a form, with its card. */
import { html, nothing } from "/static/underhood.mjs";
import { get, Task, told } from "./api.js";
import { examples, head, part, problem, progress, run } from "./parts.js";
import { plans, refresh } from "./plans.js";
import { of, put, state, tell } from "./state.js";

export const title = "Methods";
export const question = "Which tools are there?";

const task = new Task({ page: "methods" });
const asking = new Task({ heard: (part) => part?.methods && cards.set(askedFor, part.methods) });
const cards = new Map(); // by model
let askedFor = null; // the model that `asking` is about
let failure = null;
let asked = null;

const FAMILIES = {
  read: "Read", locate: "Locate", decompose: "Decompose", steer: "Steer", compare: "Compare",
  develop: "Develop", vision: "Vision",
};

/** Plans that other pages saved are among the options. */
export const enter = refresh;

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
    else asking.start({ do: "methods", model: (askedFor = mine) });
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
  task.key = `job:${card.name}`; // each method's last run stays its own
  task.sync();
  return html`<section class="wb-card"><h2>${card.name.replaceAll("_", " ")}</h2>
    <p class="wb-summary">${card.summary}</p>
    ${card.refused ? html`<div class="wb-problem"><p><strong>This model does not offer it.</strong> ${card.refused}</p></div>` : nothing}
    ${form(facts, card, said)}
    ${task.named("view").map((one) => part(one))}
    <details class="wb-more"><summary>What it computes, its cost, its source, and when it misleads</summary>
      ${card.sections.map(([name, text]) => html`<h3>${name}</h3>${name === "Example" ? html`<pre class="uh-code">${text}</pre>` : html`<p class="wb-prose">${text}</p>`}`)}
    </details></section>`;
}

const lines = (text) => text.split("\n").filter((t) => t.trim());

/** An example as the text of a form, one row a line: as many rows as the method takes. */
function columnsOf(example, card) {
  const text = (name) => (example?.rows ?? []).slice(0, card.rows).map((row) => row[name]).filter(Boolean).join("\n");
  return { prompts: text("prompt"), contrasts: text("contrast"), answers: text("answer"), wrong: text("wrong") };
}

/** What the form holds: what was filled in, else examples. */
function filled(enough, card, said) {
  const at = Math.max(0, enough.findIndex((e) => e.prompt === said.example));
  const data = { ...columnsOf(enough[at], card), ...said.data };
  const options = { ...said.options };
  for (const o of card.options) {
    const usual = o.required ? (enough[at + 1] ?? enough[0]) : null;
    if (o.control === "pairs") options[o.name] = { ...columnsOf(usual, card), ...options[o.name] };
    else if (o.name === "answers") options.answers ??= lines(data.answers).join(", ");
  }
  return { data, options };
}

function form(facts, card, said) {
  const kinds = card.data.map((d) => d.kind);
  if (kinds.includes("")) return html`<p class="wb-about">It reads something that only Python can give; see the example below.</p>`;
  const pairs = kinds.includes("pairs");
  const enough = facts.examples.filter((e) => e.rows.length >= card.rows);
  const { data, options } = filled(enough, card, said);
  const set = (name) => (value) => put({ options: { ...said.options, [name]: value } });
  const fill = (changed) => put({ data: { ...said.data, ...changed } });
  const asked = (o) => (o.control === "pairs" ? second(o, options[o.name], set(o.name)) : option(o, options[o.name] ?? "", set(o.name)));
  const free = card.options.filter((o) => !o.required);
  const ready = lines(data.prompts).length && (!pairs || lines(data.contrasts).length);
  return html`<form class="wb-form">
    ${examples({ examples: enough }, lines(data.prompts)[0], (e) => put({ example: e.prompt, data: undefined }))}
    ${pairs ? columns(data, fill) : nothing}
    ${kinds.includes("prompt") ? area("Prompts", card.data.find((d) => d.kind === "prompt").about || "one per line", data.prompts, (prompts) => fill({ prompts })) : nothing}
    ${card.options.filter((o) => o.required).map(asked)}
    ${free.length ? html`<details class="wb-more"><summary>${free.length} option${free.length === 1 ? "" : "s"}</summary>
      <div class="wb-options">${free.map(asked)}</div></details>` : nothing}
    ${run("Run", task, () => start(card, kinds, data, options), Boolean(card.refused) || !ready)}</form>`;
}

const area = (label, hint, value, change) => html`<label class="wb-field wb-wide"><span>${label} <small>${hint}</small></span>
  <textarea rows="2" dir="auto" spellcheck="false" .value=${value} @input=${(e) => change(e.target.value)}></textarea></label>`;

/** Pairs, column by column. */
function columns(data, change) {
  const one = (name, label, hint) => area(label, hint, data[name], (value) => change({ [name]: value }));
  return html`<div class="wb-pair">${one("prompts", "Prompts", "one per line")} ${one("contrasts", "Contrasts", "one for each prompt, of as many tokens")}</div>
    <div class="wb-pair">${one("answers", "Answers", "one token each")} ${one("wrong", "Held against", "one token each")}</div>`;
}

/** A second set of pairs; of its help the command line's part is left out. */
const second = (o, data, set) => html`<fieldset class="wb-edit wb-wide"><legend>${o.name} <small>a second set: ${o.about.split(/[.;] (?=[A-Z])/)[0]}</small></legend>
  ${columns(data, (changed) => set({ ...data, ...changed }))}</fieldset>`;

function start(card, kinds, data, options) {
  const cut = (said) => Object.fromEntries(Object.entries(said).map(([name, text]) => [name, lines(text)]));
  const { prompts, ...others } = cut(data);
  task.start({
    do: "method", model: state.model, name: card.name,
    ...(kinds.includes("pairs") ? { prompts, ...others } : kinds.includes("prompt") ? { prompts } : {}),
    other: kinds.includes("model") ? state.model : null,
    options: Object.fromEntries(Object.entries(options).map(([name, value]) => [name, typeof value === "object" ? cut(value) : String(value)])),
  });
}

function option(o, value, set) {
  if (o.control === "plan") return html`<div>${plans(o.name.replaceAll("_", " "), value, set, "none")} <small class="wb-help">${o.about}</small></div>`;
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
