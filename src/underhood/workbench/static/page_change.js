/** Change: the same prompt under several plans of edits, the unedited one first, as it is written. */
import { html, nothing } from "/static/underhood.mjs";
import { get, Task, told } from "./api.js";
import { editor } from "./edits.js";
import { examples, head, line, problem, progress, prompt, run } from "./parts.js";
import { named, plans, refresh } from "./plans.js";
import { of, put, state, tell } from "./state.js";

export const title = "Change";
export const question = "What if it were different?";

const task = new Task({ page: "change", heard: hear });
const saving = new Task();
const MOST = 7; // columns beside the unedited one
let palette = null;
let failure = null;
let stored = null; // the plan that was saved last

/** What each column has written so far, and wrote before while it is written anew. */
let texts = [];

/** Plans that other pages or tabs saved since are listed too. */
export const enter = refresh;

export function draw(facts) {
  const said = of("change");
  task.sync();
  if (saving.result && saving.result !== stored) {
    stored = saving.result;
    refresh();
  }
  if (!palette) load();
  if (said.prompt === undefined) fill(facts, facts.examples[0]);
  if (!said.columns) put({ columns: [first(facts, said)] }, "change");
  const columns = of("change").columns;
  const change = (i, column) => {
    put({ columns: columns.map((c, k) => (k === i ? column : c)) }, "change");
    if (said.live ?? true) soon();
  };
  return html`${head("Change", "The same prompt, unedited and under each plan of edits, with the same seed. Move a slider: the text is written again. Shade shows how sure the model was of each token.")}
    <form class="wb-form">
      ${examples(facts, said.prompt, (e) => fill(facts, e))}
      ${prompt("Prompt", said.prompt, (v) => put({ prompt: v }))}
      <div class="wb-row">
        ${line("Tokens to write", said.tokens ?? 12, (v) => put({ tokens: Number(v) }), { type: "number", min: 1, max: 512 })}
        <label class="wb-check"><input type="checkbox" .checked=${said.sample ?? false} @change=${(e) => put({ sample: e.target.checked })}> sample (otherwise greedy)</label>
        ${said.sample ? line("Temperature", said.temperature ?? 1, (v) => put({ temperature: Number(v) }), { type: "number", min: 0.05, max: 10, step: 0.05 }) : nothing}
        ${said.sample ? line("Seed", said.seed ?? 0, (v) => put({ seed: Number(v) }), { type: "number", min: 0 }) : nothing}
        <label class="wb-check"><input type="checkbox" .checked=${said.live ?? true} @change=${(e) => put({ live: e.target.checked })}> write again while I change things</label>
      </div>
      ${run("Write", task, () => write(false), !said.prompt,
        { beside: html`<button type="button" class="wb-second" ?disabled=${!said.prompt || task.busy} @click=${() => write(true)}>Write and keep</button>` })}
    </form>
    ${problem(failure)}
    <div class="wb-columns">
      <section class="wb-column"><h2>unedited</h2>${written(0)}</section>
      ${columns.map((column, i) => html`<section class="wb-column">
        <h2><input aria-label="Name of column ${i + 1}" .value=${column.label ?? ""} @input=${(e) => change(i, { ...column, label: e.target.value })}>
          <button type="button" class="wb-quiet" aria-label="Remove ${column.label}" @click=${() => drop(i)}>remove</button></h2>
        ${written(i + 1)}
        ${palette ? editor(facts, palette, column, (next) => change(i, next)) : nothing}
        ${column.edits.length
          ? html` · <button type="button" class="wb-link" @click=${() => saving.start({ do: "plan", model: state.model, name: column.label || "plan", prompt: said.prompt, edits: sent(column).edits })}>Save this plan</button>`
          : nothing}
      </section>`)}
    </div>
    <div class="wb-actions">
      ${columns.length < MOST ? html`<button type="button" class="wb-second" @click=${() => put({ columns: [...columns, { label: `column ${columns.length + 1}`, edits: [blank(facts)] }] })}>Add a column</button>` : nothing}
      ${plans("Load a saved plan", "", (id, box) => {
        box.value = "";
        if (id) open(id);
      }, "choose one")}
      ${progress(saving)}
    </div>`;
}

function load() {
  palette = { ops: [], units: [], phases: [] };
  get("/api/palette").then((said) => {
    palette = said;
    tell();
  }, (why) => {
    failure = told(why);
    tell();
  });
}

function fill(facts, example) {
  put({ prompt: example?.prompt ?? "", contrast: example?.contrast ?? "", columns: null }, "change");
}

/** A first plan that does something on any model: towards what the contrast makes of the last token. */
function first(facts, { prompt, contrast }) {
  const layer = Math.floor((2 * facts.layers) / 3);
  if (!contrast) return { label: "column 1", edits: [blank(facts)] };
  return {
    label: "towards the contrast",
    edits: [{
      site: `resid_post.${layer}`, op: "add", strength: 1, unit: "raw", pos: [-1],
      fields: { vector: { prompts: [contrast], minus: [prompt], pos: -1 } },
    }],
  };
}

const blank = (facts) => ({ site: facts.writable.includes("z") ? "z.0.0" : "resid_post.0", op: "zero", fields: {}, strength: 1, unit: "raw" });

function drop(i) {
  put({ columns: of("change").columns.filter((_, k) => k !== i) });
  texts = texts.filter((_, k) => k !== i + 1);
}

// Writing ------------------------------------------------------------------------------------------

let timer = 0;

/** Once nothing has moved for a moment. */
function soon() {
  if (!texts.length) return; // nothing was asked for yet
  clearTimeout(timer);
  timer = setTimeout(() => write(false), 30);
}

/** A column as it is sent: how a saved edit reads is for the page alone. */
const sent = (column) => ({ ...column, edits: column.edits.map(({ text, ...edit }) => edit) });

function write(keep) {
  clearTimeout(timer);
  const { prompt, columns, tokens = 12, sample = false, temperature = 1, seed = 0 } = of("change");
  task.start({ do: "generate", model: state.model, prompt, columns: columns.map(sent), max_new_tokens: tokens, sample, temperature, seed, keep });
}

function hear(part) {
  if (!part) {
    texts = [];
    return;
  }
  const i = part.column;
  if (part.name === "column") texts[i] = { ...texts[i], next: [], refused: null, writing: true };
  if (part.name === "token" && texts[i]) {
    texts[i].next.push(part);
    texts[i].tokens = texts[i].next;
  }
  if (part.name === "column_done")
    texts[i] = { tokens: part.tokens.map((text, k) => ({ text, probability: part.probabilities[k] })), effects: part.effects, fired: part.fired };
  if (part.name === "refused") texts[i] = { refused: part.refused, tokens: [] };
}

function written(i) {
  const text = texts[i];
  if (!text) return html`<p class="wb-about wb-empty">${i ? "not written yet" : "press Write"}</p>`;
  if (text.refused) return problem(text.refused);
  return html`<p class="wb-text" dir="auto" aria-live="off">${(text.tokens ?? []).map(({ text, probability }) => html`<span
      style="--p:${Number(probability).toFixed(3)}" title="${(100 * probability).toFixed(1)} %">${joined(text)}</span>`)}</p>
    ${text.effects ? html`<dl class="wb-effects">${Object.entries(text.effects).map(([name, value]) => html`<dt>${name}</dt><dd>${value.toFixed(2)}</dd>`)}
      ${(text.fired ?? []).map((f) => html`<dt>${f.edit}</dt><dd>${f.places} place${f.places === 1 ? "" : "s"}, moved ${Math.round(100 * f.moved)} %</dd>`)}</dl>` : nothing}`;
}

/** Word-level vocabularies have no spaces of their own. */
const joined = (text) => (/^[\s▁Ġ.,;:!?'’)]/.test(text) || !spaced() ? text : ` ${text}`);
const spaced = () => !texts.some((t) => t?.tokens?.some(({ text }) => /^\s/.test(text)));

// Plans ---------------------------------------------------------------------------------------------

async function open(id) {
  try {
    const { edits } = await get(`/api/results/${id}`);
    const columns = of("change").columns ?? [];
    const made = edits.map(({ saved, index, strength, unit, text }) => ({ saved, index, strength, unit, text }));
    put({ columns: [...columns, { label: named(id), edits: made }].slice(-MOST) }, "change");
    failure = null;
    soon();
  } catch (why) {
    failure = told(why);
    tell();
  }
}
