/**
 * Asking the server, and following a job.
 *
 * A job goes on when its page goes away. Its events are numbered, so a stream that broke, or that
 * was closed because the tab was hidden (a browser allows a server six open streams in all), goes
 * on after the last number seen.
 */
import { of, put, tell } from "./state.js";

/** What the server refused: `type, what, given, why, do`. */
export class Refused extends Error {
  constructor(error, status = 0) {
    super(error.what);
    this.error = error;
    this.status = status;
  }
}

async function ask(method, path, body) {
  const options = { method, headers: {} };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["content-type"] = "application/json";
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Refused({
      type: "NoServer",
      what: "the server does not answer",
      why: "it was stopped, or the machine is very busy",
      do: "look into the terminal where `underhood serve` runs, then try again",
    });
  }
  const value = await answer.json().catch(() => ({}));
  if (!answer.ok)
    throw new Refused(value.error ?? { type: "Refused", what: `the server said ${answer.status}` }, answer.status);
  return value;
}

export const get = (path) => ask("GET", path);
export const post = (path, body) => ask("POST", path, body);
export const remove = (path) => ask("DELETE", path);

/** An error of any kind as the four parts that are shown. */
export const told = (problem) =>
  problem instanceof Refused ? problem.error : { type: problem.name, what: problem.message };

const ENDED = ["done", "failed", "cancelled"];

/** One job at a time, as a page sees it: starting the next one cancels the last. */
export class Task {
  /**
   * @param {object} options
   * @param {string | null} [options.page] whose address names the job under `key`, so that a link takes it up again
   * @param {string} [options.key]
   * @param {((part: any) => void) | null} [options.heard] called with each part, and with null when another job is shown
   */
  constructor({ page = null, key = "job", heard = null } = {}) {
    this.page = page;
    this.key = key;
    this.heard = heard;
    this.clear();
  }

  clear() {
    this.end();
    Object.assign(this, { id: null, known: null, state: "empty", done: 0, total: 0, note: "", error: null });
    this.result = null;
    this.parts = [];
    this.last = 0;
  }

  get busy() {
    return this.state === "queued" || this.state === "running" || this.state === "asking";
  }

  /** Parts of a name, oldest first. */
  named(name) {
    return this.parts.filter((part) => part.name === name);
  }

  /** The newest part of a name. */
  newest(name) {
    return this.parts.findLast((part) => part.name === name);
  }

  /** What the address says of it: the job, and what it left among the results. */
  get address() {
    return (this.page && of(this.page)[this.key]) || {};
  }

  /** Show the job that the address names: after a link, a step back, another model. */
  sync() {
    if (this.state === "asking") return;
    const { id = null, result = null } = this.address;
    if (id !== this.known) {
      this.clear();
      this.heard?.(null);
      Object.assign(this, { known: id, result });
      if (id) this.attach(id);
    } else if (this.result && this.result !== result) this.keep();
  }

  keep() {
    this.known = this.id;
    if (this.page) put({ [this.key]: { id: this.id, result: this.result } }, this.page);
  }

  /** Ask for work. Resolves when the job was accepted. */
  async start(body) {
    const old = this.busy ? this.id : null;
    this.clear();
    this.state = "asking";
    tell();
    const mine = (this.turn = (this.turn ?? 0) + 1);
    if (old) remove(`/api/jobs/${old}`).catch(() => {});
    try {
      const job = await post("/api/jobs", body);
      if (mine !== this.turn) {
        remove(`/api/jobs/${job.id}`).catch(() => {});
        return;
      }
      this.set(job);
      this.follow(job.id);
      this.keep();
    } catch (problem) {
      if (mine !== this.turn) return;
      Object.assign(this, { state: "failed", error: told(problem), known: this.address.id ?? null });
      tell();
    }
  }

  /** Take up a job that was started before, by this page or another. */
  async attach(id) {
    const { jobs } = await get("/api/jobs").catch(() => ({ jobs: [] }));
    if (this.known !== id || this.id || this.state === "asking") return;
    const job = jobs.find((one) => one.id === id);
    if (job) {
      this.set(job);
      this.follow(id);
    } else this.state = "forgotten";
    tell();
  }

  follow(id) {
    this.id = id;
    this.seen = () => (document.hidden ? this.close() : this.open());
    document.addEventListener("visibilitychange", this.seen);
    this.open();
    tell();
  }

  open() {
    if (this.source || !this.id || document.hidden) return;
    this.source = new EventSource(`/api/jobs/${this.id}/events?after=${this.last}`);
    this.source.addEventListener("state", (event) => {
      this.last = Number(event.lastEventId);
      this.set(JSON.parse(event.data));
      if (ENDED.includes(this.state)) this.end();
      tell();
    });
    this.source.onerror = () => this.lost();
    this.source.addEventListener("part", (event) => {
      this.last = Number(event.lastEventId);
      const part = JSON.parse(event.data);
      this.parts.push(part);
      this.heard?.(part);
      tell();
    });
  }

  /** The stream broke: the browser tries again by itself, unless the server has forgotten the job. */
  lost() {
    this.note = "the server does not answer; trying again";
    if (this.source?.readyState === EventSource.CLOSED) {
      this.end();
      this.state = "failed";
      this.error = { what: "the server no longer knows this job", why: "it was started again", do: "look among the results, or run it again" };
    }
    tell();
  }

  set({ state, done, total, note, passes, result, error }) {
    Object.assign(this, { state, done, total, note, passes, result, error });
  }

  end() {
    this.close();
    document.removeEventListener("visibilitychange", this.seen);
  }

  close() {
    this.source?.close();
    this.source = null;
  }

  cancel() {
    if (this.id && this.busy) remove(`/api/jobs/${this.id}`).catch(() => {});
  }
}
