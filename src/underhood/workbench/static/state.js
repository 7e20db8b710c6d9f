/**
 * What a page shows, as far as a link should bring it back.
 *
 * The address's fragment holds the page, the model, and the fields of that page as compact JSON; what
 * is large (results) is named by its id. Fields of other pages stay in memory.
 */

export const PAGES = ["explain", "look", "cause", "change", "methods", "results", "model"];

/** What is filled in, by page. @type {Record<string, any>} */
const fields = Object.fromEntries(PAGES.map((page) => [page, {}]));
const listeners = new Set();
let timer = 0;

/** @type {{page: string, model: string | null}} */
export const state = { page: "explain", model: null };

/** The fields of a page, or of the one that is open. */
export const of = (page = state.page) => fields[page];

/** Change fields of the open page; the address follows. */
export function put(changes, page = state.page) {
  Object.assign(fields[page], changes);
  if (page === state.page) {
    clearTimeout(timer);
    timer = setTimeout(write, 150);
  }
  tell();
}

/** Write the address that is due: the page that is left must be found again by a step back. */
function write() {
  if (timer) history.replaceState(null, "", address());
  clearTimeout(timer);
  timer = 0;
}

/** Go to a page, perhaps with some of its fields. */
export function go(page, changes = {}) {
  write();
  Object.assign(fields[page], changes);
  state.page = page;
  history.pushState(null, "", address());
  tell();
  document.querySelector("main")?.focus({ preventScroll: true });
  scrollTo(0, 0);
}

/** Choose a model: what was filled in belonged to the other one. */
export function choose(model) {
  write();
  state.model = model;
  for (const page of PAGES) fields[page] = {};
  history.pushState(null, "", address());
  tell();
}

/** Leave the open page as if nobody had filled it in. */
export function forget() {
  write();
  fields[state.page] = {};
  history.replaceState(null, "", address());
  tell();
}

/** Call back after each change. */
export function watch(listener) {
  listeners.add(listener);
}

export function tell() {
  for (const listener of listeners) listener();
}

const address = () => `#${encodeURIComponent(JSON.stringify({ page: state.page, model: state.model, with: fields[state.page] }))}`;

/** The link that brings back what is shown. */
export const link = () => new URL(address(), location.origin).href;

/** Read the address; what does not fit is ignored, since anybody can write one. */
export function read() {
  /** @type {any} */
  let said = {};
  try {
    said = JSON.parse(decodeURIComponent(location.hash.slice(1)) || "{}") ?? {};
  } catch {
    /* a damaged link opens the first page */
  }
  if (PAGES.includes(said.page)) state.page = said.page;
  if (typeof said.model === "string") state.model = said.model;
  if (said.with && typeof said.with === "object" && !Array.isArray(said.with)) fields[state.page] = said.with;
}

addEventListener("popstate", () => {
  read();
  tell();
});
