// The INT64 that trirank sends for a text id (docs/data.md): BLAKE2b (RFC 7693) of 8 bytes, shifted right by one bit.
// Node's own BLAKE2b has 64 bytes, whose first 8 are others.
//   node client/examples/stable_id.mjs SKU-1
const MASK = (1n << 64n) - 1n;
const IV = [
  0x6a09e667f3bcc908n, 0xbb67ae8584caa73bn, 0x3c6ef372fe94f82bn, 0xa54ff53a5f1d36f1n,
  0x510e527fade682d1n, 0x9b05688c2b3e6c1fn, 0x1f83d9abfb41bd6bn, 0x5be0cd19137e2179n,
];
const SIGMA = [
  "0123456789abcdef", "ea489fd61c02b753", "b8c052fdae367194", "7931dcbe265a40f8", "905724afe1bc683d",
  "2c6a0b834d75fe19", "c51fed4a0763928b", "db7ec13950f4862a", "6fe9b308c2d714a5", "a2847615fb9e3cd0",
].map((row) => [...row].map((digit) => parseInt(digit, 16)));
const rotated = (value, bits) => ((value >> bits) | (value << (64n - bits))) & MASK;

export function stableId(text) {
  const data = new TextEncoder().encode(text);
  const blocks = Math.max(1, Math.ceil(data.length / 128));
  const padded = new Uint8Array(blocks * 128);
  padded.set(data);
  const view = new DataView(padded.buffer);
  let h = [...IV];
  h[0] ^= 0x01010008n; // no key, 8 bytes
  for (let block = 0; block < blocks; block++) {
    const m = Array.from({ length: 16 }, (_, at) => view.getBigUint64(block * 128 + at * 8, true));
    const v = [...h, ...IV];
    const last = block === blocks - 1;
    v[12] ^= BigInt(last ? data.length : (block + 1) * 128);
    if (last) v[14] ^= MASK;
    const mix = (a, b, c, d, x, y) => {
      v[a] = (v[a] + v[b] + x) & MASK; v[d] = rotated(v[d] ^ v[a], 32n);
      v[c] = (v[c] + v[d]) & MASK; v[b] = rotated(v[b] ^ v[c], 24n);
      v[a] = (v[a] + v[b] + y) & MASK; v[d] = rotated(v[d] ^ v[a], 16n);
      v[c] = (v[c] + v[d]) & MASK; v[b] = rotated(v[b] ^ v[c], 63n);
    };
    for (let round = 0; round < 12; round++) {
      const s = SIGMA[round % 10];
      for (let at = 0; at < 8; at++) {
        const shift = at < 4 ? 0 : 1, j = at % 4; // columns, then diagonals
        mix(j, 4 + ((j + shift) % 4), 8 + ((j + 2 * shift) % 4), 12 + ((j + 3 * shift) % 4), m[s[2 * at]], m[s[2 * at + 1]]);
      }
    }
    h = h.map((value, at) => value ^ v[at] ^ v[at + 8]);
  }
  return h[0] >> 1n;
}

if (process.argv[1] && import.meta.url.endsWith(process.argv[1].split("/").pop())) {
  for (const text of process.argv.slice(2)) console.log(String(stableId(text)));
}
