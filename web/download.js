// Files of a bundle: fetched once, checked, and kept in the browser's cache, so that a page works offline.

const CACHE = "dijiang";
/** The cache; undefined: a browser that has none, or refuses it. */
const opened = async () => globalThis.caches?.open(CACHE).catch(() => undefined);
/** The browser's own cache may hold a file of the bundle that was here before. */
const FRESH = { cache: "no-store" };
/** Of bundles that are read. */
const FORMAT = 2;
/** Bytes that one hash of a manifest covers. */
const CHUNK = 1 << 24;

/** The manifest of a bundle: the network's, without a network the kept one. What it does not list any more is dropped. */
export async function manifestOf(url) {
  const name = `${url}dijiang.json`;
  const cache = await opened();
  const response = await fetch(name, FRESH).catch(() => null);
  const known = response?.ok ? response.clone() : ((await cache?.match(name)) ?? response);
  if (!known?.ok) throw new Error(`${name}: ${known?.status ?? "no network"}, expected a bundle`);
  const manifest = await known.json().catch(() => ({}));
  if (!manifest?.files) throw new Error(`${name}: no manifest, expected a bundle`);
  const { format_version: version, graphs, spec } = manifest;
  if (version !== FORMAT) throw new Error(`${name}: bundle format ${version}, this page reads ${FORMAT}; export the checkpoint again`);
  if (!graphs || !spec || !dataOf(manifest)) throw new Error(`${name}: no graphs, no spec or no weights; export the checkpoint again`);
  if (response?.ok) await keep(cache, name, response);
  const listed = Object.entries(manifest.files).map(([file, record]) => nameOf(url + file, record));
  for (const { url: kept } of (await cache?.keys()) ?? []) {
    const [file, hash] = kept.startsWith(url) ? kept.slice(url.length).split("?") : [];
    if (hash && !file.includes("/") && !listed.includes(kept)) await cache.delete(kept); // below lie other bundles
  }
  return manifest;
}

/** The file of the weights. */
export const dataOf = ({ files }) => Object.keys(files).find((name) => name.endsWith(".data"));

/** A browser that has no room for a file fetches it again the next time. */
const keep = async (cache, name, response) => cache?.put(name, response).catch(() => cache.delete(name));

/** What a file is kept as: other contents have another name. */
const nameOf = (url, { sha256 }) => `${url}?${sha256.map((hash) => hash.slice(0, 8)).join("")}`;

/**
 * A file of a bundle, from the cache or the network. It is kept when it is whole, and where the browser has room for it.
 * @param {string} url
 * @param {{bytes: number, sha256: string[]}} record of the file, from the manifest.
 * @param {(done: number, total: number) => void} progress told about bytes.
 * @returns {Promise<Blob>}
 */
export async function fetched(url, record, progress = () => {}) {
  const name = nameOf(url, record);
  const cache = await opened();
  const kept = await cache?.match(name);
  if (kept) return kept.blob();
  const response = await fetch(url, FRESH).catch((error) => refuse(`${url}: no answer (${error.message})`));
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  const blob = await counted(response, record.bytes, progress);
  if (blob.size < record.bytes) refuse(`${url}: ended after ${blob.size} of ${record.bytes} bytes`);
  if (!(await isWhole(blob, record))) refuse(`${url}: damaged or of another bundle`);
  await keep(cache, name, new Response(blob));
  return blob;
}

function refuse(fact) {
  throw new Error(`${fact}; load the page again`);
}

/**
 * What a response brings; less where the network fails, which not every browser takes for an error. `total`: bytes of the file:
 * those of a compressed response are other ones, and not every server says them.
 */
async function counted(response, total, progress) {
  const parts = [];
  let done = 0;
  const reader = response.body.getReader();
  const read = () => reader.read().catch(() => ({ done: true }));
  for (let next; !(next = await read()).done; ) {
    parts.push(next.value);
    done += next.value.length;
    progress(done, total);
  }
  return new Blob(parts);
}

async function isWhole(blob, { bytes, sha256 }) {
  if (blob.size !== bytes) return false;
  if (!globalThis.crypto?.subtle) return true; // a page that came by plain HTTP has none
  for (const [at, expected] of sha256.entries()) {
    const chunk = await blob.slice(at * CHUNK, (at + 1) * CHUNK).arrayBuffer();
    if (hex(await crypto.subtle.digest("SHA-256", chunk)) !== expected) return false;
  }
  return true;
}

function hex(buffer) {
  return Array.from(new Uint8Array(buffer), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
