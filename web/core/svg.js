/**
 * Any view as a vector drawing: what the browser has laid out, read back as shapes and text.
 *
 * One reader for all kinds instead of a second drawing per kind: boxes with a background become
 * rectangles, lines of text become text where they stand, canvases and images become images, inner
 * SVGs are copied with their computed strokes. It is done in paper colours.
 */

const SKIPPED = ".uh-tools, .uh-hidden, .uh-readout, .uh-made, .uh-slider, .uh-find, .uh-nodetools, .uh-pins, script, style, summary";
const MARGIN = 16;
const SCALE = 2; // pixels of a PNG per pixel of the page
const SIDE = 16000; // what canvases may have along one side
const NS = "http://www.w3.org/2000/svg";

const pen = document.createElement("canvas").getContext("2d");
const esc = (text) => text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
const round = (x) => Math.round(x * 100) / 100;
const unseen = (colour) => !colour || colour === "transparent" || /, 0\)$|\/ 0\)$/.test(colour);

/** The view as SVG text. */
export function toSvg(host) {
  const paint = () => {
    for (const part of [host, ...host.querySelectorAll(".uh-view")]) part.repaint?.();
  };
  host.classList.add("uh-paper");
  const scrolled = [...host.querySelectorAll(".uh-scroll")].map((e) => [e, e.scrollLeft]);
  for (const [e] of scrolled) e.scrollLeft = 0;
  paint();
  try {
    return new Drawing(host).text();
  } finally {
    host.classList.remove("uh-paper");
    for (const [e, left] of scrolled) e.scrollLeft = left;
    paint();
  }
}

/** The view as a PNG, twice as fine as the screen. */
export async function toPng(host) {
  const text = toSvg(host);
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  await image.decode();
  const scale = Math.min(SCALE, SIDE / image.width, SIDE / image.height);
  const canvas = document.createElement("canvas");
  canvas.width = Math.ceil(image.width * scale);
  canvas.height = Math.ceil(image.height * scale);
  const brush = canvas.getContext("2d");
  brush.scale(scale, scale);
  brush.drawImage(image, 0, 0);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

class Drawing {
  constructor(host) {
    const box = host.getBoundingClientRect();
    this.left = box.left - MARGIN;
    this.top = box.top - MARGIN;
    this.right = 0;
    this.bottom = 0;
    this.shapes = [];
    this.defs = new Map();
    this.walk(host, null);
  }

  text() {
    const width = Math.ceil(this.right + MARGIN);
    const height = Math.ceil(this.bottom + MARGIN);
    const defs = [...this.defs.values()].map((d) => d.text).join("");
    return `<svg xmlns="${NS}" xmlns:xlink="http://www.w3.org/1999/xlink" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}"><defs>${defs}</defs><rect width="100%" height="100%" fill="#ffffff"/>${this.shapes.join("")}</svg>`;
  }

  /** A box of the page in the drawing; the drawing grows to hold it. */
  place(box) {
    const placed = { x: box.left - this.left, y: box.top - this.top, w: box.width, h: box.height };
    this.right = Math.max(this.right, placed.x + placed.w);
    this.bottom = Math.max(this.bottom, placed.y + placed.h);
    return placed;
  }

  walk(node, clip) {
    if (node.matches(SKIPPED) || node.parentElement.matches("details:not([open])")) return;
    const style = getComputedStyle(node);
    if (style.display === "none" || style.visibility === "hidden") return;
    const box = node.getBoundingClientRect();
    const faint = Number(style.opacity) < 1;
    if (faint) this.shapes.push(`<g opacity="${style.opacity}">`);
    this.box(node, style);
    if (node.localName === "canvas" || node.localName === "img") this.image(node, style, box);
    else if (node.localName === "svg") this.svg(node, box);
    else {
      const cut = style.overflowX === "hidden" || style.textOverflow === "ellipsis";
      const inner = cut && box.width ? box : clip;
      for (const child of node.childNodes) {
        if (child.nodeType === Node.TEXT_NODE) this.words(child, style, inner);
        else if (child.nodeType === Node.ELEMENT_NODE) this.walk(child, inner);
      }
    }
    if (faint) this.shapes.push("</g>");
  }

  /** Background, borders and rings. */
  box(node, style) {
    const fills = [];
    if (!unseen(style.backgroundColor)) fills.push(style.backgroundColor);
    const pattern = style.backgroundImage !== "none" && this.pattern(style.backgroundImage);
    if (pattern) fills.push(pattern);
    const ring = /^(rgba?\([^)]*\)|color\([^)]*\)) 0px 0px 0px ([\d.]+)px( inset)?/.exec(style.boxShadow);
    const border = (edge) => parseFloat(style[`border${edge}Width`]) && !unseen(style[`border${edge}Color`]);
    if (!fills.length && !ring && !border("Bottom") && !border("Top")) return;
    for (const rect of node.getClientRects()) {
      if (!rect.width || !rect.height) continue;
      const { x, y, w, h } = this.place(rect);
      const rx = Math.min(parseFloat(style.borderTopLeftRadius) || 0, w / 2, h / 2);
      const thick = pattern ? Number(/^100% ([\d.]+)px/.exec(style.backgroundSize)?.[1] ?? 0) : 0;
      for (const fill of fills) {
        const line = fill === pattern && thick > 0;
        this.rect(x, line ? y + h - thick : y, w, line ? thick : h, line ? 0 : rx, `fill="${fill}"`);
      }
      if (ring && !unseen(ring[1])) {
        const d = (ring[3] ? 1 : -1) * (Number(ring[2]) / 2);
        this.rect(x + d, y + d, w - 2 * d, h - 2 * d, rx, `fill="none" stroke="${ring[1]}" stroke-width="${ring[2]}"`);
      }
      for (const [edge, at] of [["Top", y], ["Bottom", y + h]])
        if (border(edge))
          this.shapes.push(`<path d="M${round(x)} ${round(at)}h${round(w)}" stroke="${style[`border${edge}Color`]}" stroke-width="${style[`border${edge}Width`]}"/>`);
    }
  }

  rect(x, y, w, h, rx, ink) {
    const corner = rx ? ` rx="${round(rx)}"` : "";
    this.shapes.push(`<rect x="${round(x)}" y="${round(y)}" width="${round(w)}" height="${round(h)}"${corner} ${ink}/>`);
  }

  /** A gradient or hatching, defined once. */
  pattern(css) {
    if (this.defs.has(css)) return this.defs.get(css).url;
    const colours = css.match(/rgba?\([^)]*\)|color\([^)]*\)/g);
    if (!colours) return null;
    const id = `f${this.defs.size}`;
    const stops = colours.map((c, i) => `<stop offset="${i / Math.max(colours.length - 1, 1)}" stop-color="${c}"/>`);
    const text = css.startsWith("repeating")
      ? `<pattern id="${id}" width="5.66" height="5.66" patternUnits="userSpaceOnUse" patternTransform="rotate(${css.includes("135deg") ? 45 : 0})"><rect width="6" height="6" fill="${colours[0]}"/><path d="M0 0V6" stroke="${colours.at(-1)}" stroke-width="1.5"/></pattern>`
      : `<linearGradient id="${id}">${stops.join("")}</linearGradient>`;
    this.defs.set(css, { url: `url(#${id})`, text });
    return `url(#${id})`;
  }

  image(node, style, box) {
    if (!box.width || !box.height) return;
    const { x, y, w, h } = this.place(box);
    const source = node.localName === "canvas" ? node.toDataURL() : node.src;
    const sharp = style.imageRendering === "pixelated" ? ' style="image-rendering:pixelated"' : "";
    this.shapes.push(`<image x="${round(x)}" y="${round(y)}" width="${round(w)}" height="${round(h)}" preserveAspectRatio="none" xlink:href="${source}"${sharp}/>`);
  }

  /** An inner SVG with the strokes and fills that the style sheet gives it. */
  svg(node, box) {
    if (!box.width || !box.height) return;
    const { x, y, w, h } = this.place(box);
    const inner = [...node.querySelectorAll("path, rect")].map((shape) => {
      const style = getComputedStyle(shape);
      const own = ["d", "x", "y", "width", "height"].filter((a) => shape.hasAttribute(a));
      const given = own.map((a) => `${a}="${shape.getAttribute(a)}"`);
      const seen = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linecap", "opacity"]
        .filter((name) => !["none", "normal"].includes(style[name]) || name === "fill")
        .map((name) => `${name}="${esc(style[name])}"`);
      return `<${shape.localName} ${[...given, ...seen].join(" ")} vector-effect="non-scaling-stroke"/>`;
    });
    const ratio = node.getAttribute("preserveAspectRatio") ?? "xMidYMid meet";
    this.shapes.push(`<svg x="${round(x)}" y="${round(y)}" width="${round(w)}" height="${round(h)}" viewBox="${node.getAttribute("viewBox")}" preserveAspectRatio="${ratio}" overflow="visible">${inner.join("")}</svg>`);
  }

  /** Text, one element per line as the browser broke it; what is cut off on screen is cut here. */
  words(node, style, clip) {
    if (!node.data.trim()) return;
    const upright = style.writingMode.startsWith("vertical");
    const range = document.createRange();
    const lines = [];
    let at = 0;
    for (const char of node.data) {
      range.setStart(node, at);
      range.setEnd(node, (at += char.length));
      const box = range.getBoundingClientRect();
      if (!box.width && !box.height) continue;
      const middle = [(box.left + box.right) / 2, (box.top + box.bottom) / 2];
      const outside =
        clip && (middle[0] < clip.left || middle[0] > clip.right || middle[1] < clip.top || middle[1] > clip.bottom);
      const key = Math.round(upright ? box.left : box.top);
      const line = lines.at(-1);
      if (line && Math.abs(line.key - key) < 2) grow(line, char, box, outside);
      else lines.push(grow({ key, text: "", cut: false }, char, box, outside));
    }
    for (const line of lines) if (line.text.trim()) this.line(line, node, style, upright);
  }

  line(line, node, style, upright) {
    const { x, y, w, h } = this.place({ left: line.left, top: line.top, width: line.right - line.left, height: line.bottom - line.top });
    pen.font = `${style.fontStyle} ${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
    const { fontBoundingBoxAscent: up, fontBoundingBoxDescent: down } = pen.measureText("x");
    const baseline = up / (up + down);
    const turned = upright && node.parentElement.closest(".uh-upright");
    const place = !upright
      ? `x="${round(x)}" y="${round(y + h * baseline)}"`
      : turned
        ? `transform="translate(${round(x + w * baseline)} ${round(y + h)}) rotate(-90)"`
        : `transform="translate(${round(x + w * (1 - baseline))} ${round(y)}) rotate(90)"`;
    const slant = style.fontStyle === "normal" ? "" : ` font-style="${style.fontStyle}"`;
    const text = style.textTransform === "uppercase" ? line.text.toUpperCase() : line.text;
    this.shapes.push(`<text ${place} font-family="${esc(style.fontFamily)}" font-size="${style.fontSize}" font-weight="${style.fontWeight}"${slant} fill="${style.color}" xml:space="preserve">${esc(text)}${line.cut ? "…" : ""}</text>`);
  }
}

/** Add a character to its line; one that is cut off leaves only the sign that it was. */
function grow(line, char, box, outside) {
  if (outside) {
    line.cut = true;
    return line;
  }
  line.text += char;
  line.left = Math.min(line.left ?? Infinity, box.left);
  line.top = Math.min(line.top ?? Infinity, box.top);
  line.right = Math.max(line.right ?? -Infinity, box.right);
  line.bottom = Math.max(line.bottom ?? -Infinity, box.bottom);
  return line;
}
