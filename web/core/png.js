/** Width and height that a PNG file in base64 tells in its first chunk. */
export function pngSize(base64) {
  const head = Uint8Array.from(atob(base64.slice(0, 32)), (c) => c.charCodeAt(0));
  const number = (at) => new DataView(head.buffer).getUint32(at);
  return [number(16), number(20)];
}
