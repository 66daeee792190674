// A DiJiang bundle in a browser: greedy text, a state of constant size, WebAssembly or WebGPU.
//
//     const model = await Model.load("bundle/", { progress: (done, total) => ... });
//     for await (const text of model.generate("def main(", { maxTokens: 64 })) ...

import { Tokenizer } from "@huggingface/tokenizers";
import { dataOf, fetched, manifestOf } from "./download.js";
import { NativeSession } from "./native.js";
import { OrtSession } from "./ort.js";

const onnxruntime = (runtime) => async (parts) => OrtSession.open({ ...parts, ort: await runtime() });

/** What runs a graph here, the best first: graphs of a bundle, whether it is there, and how it is opened. */
export const PROVIDERS = {
  webgpu: { graphs: ["webgpu", "ort"], here: hasGpu, open: onnxruntime(() => import("onnxruntime-web/webgpu")) },
  cpu: { graphs: ["native"], here: async () => true, open: NativeSession.open },
  wasm: { graphs: ["ort", "primitive"], here: async () => true, open: onnxruntime(() => import("onnxruntime-web/wasm")) },
};
/** Tokens of a prompt that go through the graph at once. */
const PIECE = 256;
/** Tokens before a new one that decide how it reads; tokens that may wait for the end of a character. */
const CONTEXT = 16;
const WAITING = 48;
/** Texts before a continuation, tried in turn: what a tokenizer puts at the start of any text lands there. */
const ANCHORS = ["\n", ".", "a"];
/** How ids are read: as they are, without a space less before a comma. */
const READING = { skip_special_tokens: true, clean_up_tokenization_spaces: false };
/** Milliseconds after which a page may paint, and hear its user. */
const BUSY = 30;

/** Whether there is a GPU; one that software imitates counts if it was asked for. */
async function hasGpu(asked) {
  const adapter = await globalThis.navigator?.gpu?.requestAdapter().catch(() => null);
  return Boolean(adapter) && (asked || !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter));
}

/** The browser has its turn. */
function rest() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => (port1.close(), resolve());
    port2.postMessage(null);
  });
}

/**
 * All that a model keeps of a text. `layers`: a Float32Array each; while a session has them in its memory, they are there.
 * `pending`: the token that was not fed yet. `last`: ids of the last tokens, of which `open` belong to a character that is not
 * whole.
 */
export class State {
  #layers;
  #home = null;
  #busy = false;

  constructor(fingerprint, layers, position = 0, pending = null, last = [], open = 0) {
    Object.assign(this, { fingerprint, layers, position, pending, last, open });
  }

  get layers() {
    return this.#home ? this.#home.layers : this.#layers;
  }

  set layers(layers) {
    if (this.#home) this.#home.guest = null;
    this.#home = null;
    this.#layers = layers;
  }

  /** Out of the memory of a session. */
  leaveSession() {
    this.layers = this.layers.map((layer) => layer.slice());
  }

  /** Into the memory of a session, for good or until another state comes. */
  moveInto(session) {
    session.guest?.leaveSession();
    const { layers } = this;
    session.layers.forEach((place, at) => place.set(layers[at]));
    this.layers = null;
    this.#home = session;
    session.guest = this;
  }

  /** For one generation; an error while another one has it. */
  take() {
    if (this.#busy) throw new Error("the state is in use by a generation that has not ended: end that one, or give this one a new state");
    this.#busy = true;
  }

  leave() {
    this.#busy = false;
  }

  /** A plain object that IndexedDB stores. */
  toObject() {
    return { ...this, layers: this.layers.map((layer) => layer.slice()), last: [...this.last] };
  }

  static from(found) {
    return new State(found.fingerprint, found.layers, found.position, found.pending, found.last, found.open);
  }
}

/** A tokenizer.json that is read here as everywhere else; an error where it would give other ids. */
function readable(tokenizer) {
  const { type, byte_fallback: spells } = tokenizer.model ?? {};
  if (type === "Unigram" && spells) throw new Error("the tokenizer spells unknown text in bytes (Unigram, byte_fallback), which is not done here: give token ids, and run the bundle elsewhere");
  return tokenizer;
}

/** The shape of a layer of a state. */
function shapeOf({ num_kv_heads: groups, hidden_size: width, num_heads: heads }) {
  return [1, groups, width / heads, width / heads];
}

export class Model {
  /**
   * Load a bundle.
   * @param {string} url of its folder, with a slash at the end.
   * @param {{provider?: string, threads?: number, builds?: string[], progress?: (done: number, total: number) => void}} options
   *   provider: a row of PROVIDERS; none: the first that works here. threads: onnxruntime-web's; they need a page that is
   *   cross-origin isolated. builds: those of our module that may run, of BUILDS in core.js.
   * @returns {Promise<Model>} `provider` and `graph` run it; `failures`: why what is better does not.
   */
  static async load(url, { provider, threads, builds, progress = () => {} } = {}) {
    url = new URL(url, globalThis.location?.href).href; // as the browser's cache calls it
    const manifest = await manifestOf(url);
    const file = (name, told) => fetched(url + name, manifest.files[name], told);
    const json = async (name) => (name in manifest.files ? JSON.parse(await (await file(name)).text()) : {});
    const names = provider ? [provider] : Object.keys(PROVIDERS);
    const data = dataOf(manifest);
    const weights = await file(data, progress);
    const has = "tokenizer.json" in manifest.files;
    const tokenizer = has ? new Tokenizer(readable(await json("tokenizer.json")), await json("tokenizer_config.json")) : null;
    const failures = [];
    for (const name of names) {
      const row = PROVIDERS[name];
      const graph = row?.graphs.find((one) => one in manifest.graphs);
      if (!row || !(await row.here(Boolean(provider)))) {
        failures.push(`${name} is not here`);
        continue;
      }
      if (!graph) {
        failures.push(`${name}: the bundle has no ${row.graphs.join(" or ")} graph`);
        continue;
      }
      try {
        const source = new Uint8Array(await (await file(manifest.graphs[graph].file)).arrayBuffer());
        const { spec } = manifest;
        const parts = { provider: name, source, weights, data, spec, shape: shapeOf(spec), threads, builds, longest: PIECE };
        return new Model({ session: await row.open(parts), manifest, provider: name, graph, tokenizer, failures });
      } catch (error) {
        failures.push(`${name}: ${error.message}`);
      }
    }
    throw new Error(`nothing runs ${url} here (${failures.join("; ")})`);
  }

  constructor(parts) {
    Object.assign(this, parts);
    this.spec = this.manifest.spec;
    this.limit = this.manifest.positions_limit ?? Infinity;
  }

  /** Gives back what it has of memory; it is of no use then. */
  async close() {
    this.session.guest?.leaveSession();
    await this.session.close?.();
    this.session = null;
  }

  /** The state before the first token. */
  newState() {
    const size = shapeOf(this.spec).reduce((a, b) => a * b);
    const layers = Array.from({ length: this.spec.num_layers }, () => new Float32Array(size));
    return new State(this.manifest.fingerprint, layers);
  }

  /**
   * Continue a prompt, or a state where its last generation stopped. The state is advanced.
   * @param {string | number[]} prompt text, or token ids; "" goes on. Without a tokenizer in the bundle, ids.
   * @param {{state?: State, maxTokens?: number, onToken?: (id: number) => void, signal?: AbortSignal}} options
   *   signal: ends it; the state stands after the last token then.
   * @yields {string} text, whole characters.
   */
  async *generate(prompt, { state = this.newState(), maxTokens = 128, onToken = () => {}, signal, ...others } = {}) {
    const [unknown] = Object.keys(others);
    if (unknown) throw new Error(`option ${unknown} is unknown, expected one of state, maxTokens, onToken, signal; the most likely token is always taken`);
    if (!Number.isInteger(maxTokens) || maxTokens < 1) throw new Error(`maxTokens is ${maxTokens}, expected a whole number, 1 or more`);
    if (!this.session) throw new Error("the model is closed: load it again");
    if (state.fingerprint !== this.manifest.fingerprint) throw new Error("the state is of another checkpoint");
    state.take();
    try {
      yield* this.#generated(prompt, state, maxTokens, onToken, signal);
    } finally {
      state.leave();
    }
  }

  async *#generated(prompt, state, maxTokens, onToken, signal) {
    const begins = state.position === 0;
    const given = typeof prompt === "string" ? this.read(prompt, begins) : prompt;
    let ids = [...(state.pending === null ? [] : [state.pending]), ...given];
    if (!ids.length) throw new Error("nothing to go on from: give a prompt");
    this.expectFit(ids, state);
    const stream = new TextStream(this.tokenizer, [...state.last, ...given], given.length ? 0 : state.open);
    let began = performance.now();
    for (let made = 0; made < maxTokens; made++) {
      let token;
      for (let start = 0; start < ids.length; start += PIECE) {
        signal?.throwIfAborted();
        token = await this.step(ids.slice(start, start + PIECE), state);
        if (performance.now() - began > BUSY) {
          await rest();
          began = performance.now();
        }
      }
      state.last = [...state.last, ...(made ? [] : given), token].slice(-CONTEXT - WAITING);
      state.pending = token;
      onToken(token);
      const end = this.spec.eos_token_ids.includes(token);
      const ended = end || state.position >= this.limit;
      const text = (end ? "" : stream.push(token)) + (ended ? stream.flush() : "");
      state.open = stream.open.length;
      if (text) yield text;
      if (ended) return;
      ids = [token];
    }
  }

  /** Token ids of a text. One that goes on gets nothing that a tokenizer puts at the start of any text, as LLaMA's space. */
  read(text, begins) {
    if (!text) return [];
    if (!this.tokenizer) throw new Error("the bundle has no tokenizer: give token ids");
    const encoded = (what) => this.tokenizer.encode(what, { add_special_tokens: begins }).ids;
    for (const anchor of begins ? [] : ANCHORS) {
      const before = encoded(anchor);
      const both = encoded(anchor + text);
      if (before.every((id, at) => id === both[at])) return both.slice(before.length);
    }
    return encoded(text);
  }

  /** An error unless ids are tokens of this model, and its positions have room for them. */
  expectFit(ids, state) {
    const { vocab_size: size } = this.spec;
    const wrong = ids.find((id) => !(Number.isInteger(id) && id >= 0 && id < size));
    if (wrong !== undefined) throw new Error(`token ${wrong}, expected 0 to ${size - 1}`);
    if (state.position + ids.length > this.limit) throw new Error(`the model's positions end at ${this.limit}`);
  }

  /**
   * Advance a state over ids, PIECE at most; the most likely next token. A state is what it was after an error, but for
   * one that holds NaN.
   * @param {number[]} ids
   * @param {State} state
   * @returns {Promise<number>}
   */
  async step(ids, state) {
    if (!ids.length) throw new Error("no token to feed");
    this.expectFit(ids, state);
    const token = await this.session.step(ids, state);
    state.position += ids.length;
    state.pending = null;
    // What ArgMax says of NaN is the first token.
    if (token === 0 && state.layers.at(-1).some(Number.isNaN)) throw new Error("the state holds NaN: begin a new one");
    return token;
  }
}

/** Text of a growing sequence, whole characters only; `context`: tokens before, the last `open` of them not given out. */
export class TextStream {
  constructor(tokenizer, context, open = 0) {
    this.tokenizer = tokenizer;
    this.known = context.slice(0, context.length - open).slice(-CONTEXT);
    this.open = context.slice(context.length - open);
  }

  push(token) {
    this.open.push(token);
    const text = this.following();
    if (text.endsWith("\ufffd") && this.open.length < WAITING) return "";
    this.known = [...this.known, ...this.open].slice(-CONTEXT);
    this.open = [];
    return text;
  }

  flush() {
    const text = this.open.length ? this.following() : "";
    this.open = [];
    return text;
  }

  following() {
    const named = (id) => this.tokenizer?.id_to_token(id) !== undefined; // a vocabulary may be padded
    const read = (ids) => ((ids = ids.filter(named)).length ? this.tokenizer.decode(ids, READING) : "");
    const before = read(this.known);
    const whole = read([...this.known, ...this.open]);
    return whole.startsWith(before) ? whole.slice(before.length) : read(this.open);
  }
}
