// Our kernels in WebAssembly: native/ as a module with plain functions on addresses of its memory (native/wasm/).

/** Where each build is: written so that bundlers find the files. */
const PLACES = {
  "core-relaxed.wasm": new URL("./core-relaxed.wasm", import.meta.url),
  "core.wasm": new URL("./core.wasm", import.meta.url),
};
/** The builds, the best first: with relaxed SIMD, where the browser has it and its multiply-add rounds once; with plain SIMD. */
export const BUILDS = Object.keys(PLACES);

/**
 * The module.
 * @param {string[]} builds of BUILDS, to choose from.
 * @param {(name: string) => Promise<ArrayBuffer>} read a file beside this one.
 * @returns {Promise<WebAssembly.Exports>} its functions and its memory, which nobody uses yet.
 * @throws {Error} a build is not there or damaged, or there is no SIMD.
 */
export async function loadCore(builds = BUILDS, read = fetchedBeside) {
  let bytes;
  for (const name of builds) {
    bytes = await read(name);
    if (!WebAssembly.validate(bytes)) continue;
    const { instance } = await WebAssembly.instantiate(bytes);
    instance.exports._initialize();
    if (instance.exports.fuses()) return instance.exports;
  }
  throw new Error(`${builds.at(-1)}: ${bytes.byteLength} bytes that this browser does not compile; it is damaged, or there is no SIMD`);
}

async function fetchedBeside(name) {
  const response = await fetch(PLACES[name]);
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}; build it with make web/${name}`);
  return response.arrayBuffer();
}
