/** Tokens whose white space can be seen; the rules of `view/markup.py`. */
import { html } from "lit";

const SPACE = "\u00b7";
const NEWLINE = "\u21b5";
const TAB = "\u2192";
const EMPTY = "\u2205";
// Joiners and variation selectors are part of ordinary words and emoji.
const HARMLESS = new Set(["\u200c", "\u200d", "\ufe0e", "\ufe0f", "\u00ad"]);
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/u;
const GLYPHS = { "\n": NEWLINE, "\t": TAB, "\r": "\u240d" };

// Control and direction characters, which would reach beyond the text that they are in.
const REACHING = /[\0-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069]/g;

const byNumber = (char) => `⟨U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
const safe = (char) => (!HIDDEN.test(char) || HARMLESS.has(char) ? char : byNumber(char));

/** The document with such characters written by number, in all its texts. */
export function tame(value) {
  if (typeof value === "string") return value.replace(REACHING, byNumber);
  if (Array.isArray(value)) {
    // Most of a document are numbers: they are looked at, not copied.
    const at = value.findIndex((item) => tame(item) !== item);
    return at < 0 ? value : value.map(tame);
  }
  if (value === null || typeof value !== "object") return value;
  const pairs = Object.entries(value);
  if (pairs.every(([key, item]) => tame(key) === key && tame(item) === item)) return value;
  return Object.fromEntries(pairs.map(([key, item]) => [tame(key), tame(item)]));
}

/** The token as one line of text with its white space shown. */
export function visible(token) {
  if (!token) return EMPTY;
  const body = token.replace(/^ +/, "");
  const core = body.replace(/ +$/, "");
  let text = SPACE.repeat(token.length - body.length);
  for (const char of core) text += GLYPHS[char] ?? safe(char);
  return text + SPACE.repeat(body.length - core.length);
}

const faint = (glyphs) => html`<span class="ws">${glyphs}</span>`;

/** The token with its white space in a fainter ink, as text and templates. */
export function tokenHtml(token) {
  const text = visible(token);
  // Nearly every token is of one piece, and a page can hold ten thousand.
  if (!/[·↵→]/.test(text)) return text;
  return text.split(/(^·+|·+$|[↵→])/).map((part) => {
    if (!part) return "";
    return /^(·+|[↵→])$/.test(part) ? faint(part) : part;
  });
}

/** The token inside running text: real spaces, newlines shown and also broken. */
export function proseHtml(token) {
  const parts = [];
  let run = "";
  for (const char of token) {
    if (char === "\n") {
      parts.push(run, faint(NEWLINE), "\n");
      run = "";
    } else run += char === " " || char === "\t" ? char : safe(char);
  }
  return parts.length ? [...parts, run] : run;
}
