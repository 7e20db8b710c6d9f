/** Results: everything that was kept, opened again, compared, deleted. */
import { html, nothing } from "/static/underhood.mjs";
import { get, remove, told } from "./api.js";
import { evidence, head, problem, view } from "./parts.js";
import { named } from "./plans.js";
import { go, of, put, tell } from "./state.js";

export const title = "Results";
export const question = "What was found before?";

let entries = null;
let failure = null;
const opened = new Map(); // what the server said of a result, or of a pair

/** What other pages kept since is listed too. */
export function enter() {
  entries = null;
}

export function draw() {
  const said = of("results");
  if (!entries) refresh();
  if (said.open) need(said.open, `/api/results/${encodeURIComponent(said.open)}`);
  const pair = said.both ?? [];
  return html`${head("Results", "Everything that was found here, as files that Python and the command line open too.")}
    ${problem(failure)}
    <div class="wb-actions">
      <button type="button" class="wb-second" @click=${refresh}>Refresh the list</button>
      <button type="button" class="wb-second" ?disabled=${pair.length !== 2} @click=${() => put({ open: null, compare: pair })}>Compare the two that are ticked</button></div>
    ${table(said, pair)} ${said.compare ? compared(said.compare) : said.open ? one(said.open) : nothing}`;
}

async function refresh() {
  entries ??= [];
  try {
    entries = (await get("/api/results")).results;
    failure = null;
  } catch (why) {
    failure = told(why);
  }
  tell();
}

async function need(key, path) {
  if (opened.has(key)) return;
  opened.set(key, null);
  try {
    opened.set(key, await get(path));
  } catch (why) {
    opened.set(key, { refused: told(why) });
  }
  tell();
}

function table(said, pair) {
  if (!entries?.length) return html`<p class="wb-about">Nothing yet. What the other pages find is kept here. <button type="button" class="wb-link" @click=${() => go("explain")}>Explain a sentence</button></p>`;
  const tick = (id, on) => put({ both: on ? [...pair, id].slice(-2) : pair.filter((x) => x !== id) });
  return html`<div class="uh-scroll"><table class="uh-rows wb-results"><thead><tr><th scope="col"><span class="uh-hidden">Compare</span></th><th scope="col">When</th><th scope="col">What</th><th scope="col">Model</th><th scope="col">Prompt</th><th scope="col"><span class="uh-hidden">Delete</span></th></tr></thead>
    <tbody>${entries.map((e) => html`<tr class=${e.id === said.open ? "wb-picked" : ""}>
      <td><input type="checkbox" aria-label="Compare ${e.id}" .checked=${pair.includes(e.id)} ?disabled=${e.kind === "plan" || e.kind === "problem"} @change=${(c) => tick(e.id, c.target.checked)}></td>
      <td>${new Date(e.date * 1000).toLocaleString([], { dateStyle: "short", timeStyle: "short" })}</td>
      <td><button type="button" class="wb-link" @click=${() => put({ open: e.id, compare: null })}>${what(e)}</button>
        ${e.kind === "problem" ? html`<small class="wb-bad">cannot be read</small>` : nothing}</td>
      <td>${e.model}</td><td class="wb-cut" title=${e.prompt ?? ""}>${e.kind === "explanation" ? e.title : (e.prompt ?? "")}</td>
      <td><button type="button" class="wb-quiet" aria-label="Delete ${e.id}" @click=${() => forget(e)}>delete</button></td></tr>`)}</tbody></table></div>`;
}

const what = (e) => ({ explanation: "explanation", plan: `plan: ${named(e.id)}` })[e.kind] ?? e.title.replaceAll("_", " ");

async function forget({ id, title }) {
  if (!confirm(`Delete ${title} (${id})? The file is gone then.`)) return;
  try {
    await remove(`/api/results/${id}`);
    opened.delete(id);
    if (of("results").open === id) put({ open: null }, "results");
  } catch (why) {
    failure = told(why);
  }
  refresh();
}

const READ = { result: "uh.Result.load", plan: "uh.Plan.load" };

function one(id) {
  const found = opened.get(id);
  if (!found) return html`<p role="status">opening…</p>`;
  if (found.refused) return problem(found.refused);
  return html`<article class="wb-report"><h2>${found.title}</h2>
    <p class="wb-about"><code>${found.id}</code>
      ${found.kind === "plan" ? nothing : html` · <a href="/api/results/${found.id}/report" download>Save as a page</a>`}
      ${READ[found.kind] ? html` · <code>${READ[found.kind]}("${found.id}.json")</code>` : nothing}</p>
    ${found.lead ? html`<div class="uh-lead">${found.lead.map((s) => html`<p>${s}</p>`)}</div>` : nothing}
    ${found.sections
      ? found.sections.map((s) => html`<section class="uh-section"><h2><span class="uh-no">${s.number}</span><span>${s.title}</span></h2>${s.question ? html`<p class="uh-question">${s.question}</p>` : nothing}${evidence(s)}</section>`)
      : found.views.map((v) => view(v))}
    ${found.edits ? html`<ul>${found.edits.map((e) => html`<li><code>${e.text}</code></li>`)}</ul>` : nothing}</article>`;
}

function compared([a, b]) {
  const key = `${a} ${b}`;
  need(key, `/api/compare?a=${encodeURIComponent(a)}&b=${encodeURIComponent(b)}`);
  const found = opened.get(key);
  if (!found) return html`<p role="status">opening…</p>`;
  if (found.refused) return problem(found.refused);
  const both = html`<div class="wb-columns">${found.results.map((r) => html`<article class="wb-column"><h2>${r.title}</h2><p class="wb-about"><code>${r.id}</code></p>${r.views.map((v) => view(v))}</article>`)}</div>`;
  if (!found.difference)
    return html`<p class="wb-about">Their pictures have other rows and columns, so there is no difference to draw.</p>${both}`;
  return html`${view(found.difference, 2)}<details class="wb-more"><summary>Both in full, side by side</summary>${both}</details>`;
}
