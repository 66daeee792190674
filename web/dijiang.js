// A DiJiang bundle in a browser: greedy text, a state of constant size, WebAssembly or WebGPU.
//
//     const model = await Model.load("bundle/", { progress: (done, total) => ... });
//     for await (const text of model.generate("def main(", { maxTokens: 64 })) ...

import { Tokenizer } from "@huggingface/tokenizers";
import { fetched, manifestOf } from "./download.js";

/** What runs a graph here, the best first: graphs of a bundle, the build of onnxruntime-web, and whether it is there. */
export const PROVIDERS = {
  webgpu: { graphs: ["webgpu", "ort"], runtime: () => import("onnxruntime-web/webgpu"), here: hasGpu },
  wasm: { graphs: ["ort", "primitive"], runtime: () => import("onnxruntime-web/wasm"), here: async () => true },
};
/** Tokens of a prompt that go through the graph at once. */
const PIECE = 256;
/** Tokens before a new one that decide how it reads; tokens that may wait for the end of a character. */
const CONTEXT = 16;
const WAITING = 48;

/** Whether there is a GPU; one that software imitates counts if it was asked for. */
async function hasGpu(asked) {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return Boolean(adapter) && (asked || !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter));
}

/**
 * All that a model keeps of a text. `layers`: a Float32Array each. `pending`: the token that was not fed yet. `last`: ids of the
 * last tokens, of which `open` belong to a character that is not whole.
 */
export class State {
  constructor(fingerprint, layers, position = 0, pending = null, last = [], open = 0) {
    Object.assign(this, { fingerprint, layers, position, pending, last, open });
  }

  /** A plain object that IndexedDB stores. */
  toObject() {
    return { ...this, layers: this.layers.map((layer) => layer.slice()), last: [...this.last] };
  }

  static from(found) {
    return new State(found.fingerprint, found.layers, found.position, found.pending, found.last, found.open);
  }
}

export class Model {
  /**
   * Load a bundle.
   * @param {string} url of its folder, with a slash at the end.
   * @param {{provider?: string, threads?: number, progress?: (done: number, total: number) => void}} options
   *   provider: a row of PROVIDERS; none: the first that works here. threads: WebAssembly's; they need a page that is
   *   cross-origin isolated.
   */
  static async load(url, { provider, threads, progress = () => {} } = {}) {
    const manifest = await manifestOf(url);
    const file = (name, told) => fetched(url + name, manifest.files[name], told);
    const json = async (name) => (name in manifest.files ? JSON.parse(await (await file(name)).text()) : {});
    const names = provider ? [provider] : Object.keys(PROVIDERS);
    const data = Object.keys(manifest.files).find((name) => name.endsWith(".data"));
    const weights = new Uint8Array(await (await file(data, progress)).arrayBuffer());
    const has = "tokenizer.json" in manifest.files;
    const tokenizer = has ? new Tokenizer(await json("tokenizer.json"), await json("tokenizer_config.json")) : null;
    const failures = [];
    for (const name of names) {
      const row = PROVIDERS[name];
      const graph = row?.graphs.find((one) => one in manifest.graphs);
      if (!row || !graph || !(await row.here(Boolean(provider)))) {
        failures.push(`${name} is not here`);
        continue;
      }
      try {
        const ort = await row.runtime();
        ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? (threads ?? navigator.hardwareConcurrency) : 1;
        const source = new Uint8Array(await (await file(manifest.graphs[graph].file)).arrayBuffer());
        const session = await ort.InferenceSession.create(source, {
          executionProviders: [name],
          externalData: [{ path: data, data: weights }],
        });
        return new Model({ ort, session, manifest, provider: name, graph, tokenizer });
      } catch (error) {
        failures.push(`${name}: ${error.message}`);
      }
    }
    throw new Error(`nothing runs ${url} here (${failures.join("; ")})`);
  }

  constructor(parts) {
    Object.assign(this, parts);
    this.spec = this.manifest.spec;
    this.shape = [1, this.spec.num_kv_heads, this.spec.hidden_size / this.spec.num_heads];
    this.shape.push(this.shape[2]);
  }

  /** The state before the first token. */
  newState() {
    const size = this.shape.reduce((a, b) => a * b);
    const layers = Array.from({ length: this.spec.num_layers }, () => new Float32Array(size));
    return new State(this.manifest.fingerprint, layers);
  }

  /**
   * Continue a prompt, or a state where its last generation stopped. The state is advanced.
   * @param {string | number[]} prompt text, or token ids; "" goes on. Without a tokenizer in the bundle, ids.
   * @param {{state?: State, maxTokens?: number, onToken?: (id: number) => void}} options
   * @yields {string} text, whole characters.
   */
  async *generate(prompt, { state = this.newState(), maxTokens = 128, onToken = () => {} } = {}) {
    if (state.fingerprint !== this.manifest.fingerprint) throw new Error("the state is of another checkpoint");
    const begins = state.position === 0;
    const read = (text) => this.tokenizer.encode(text, { add_special_tokens: begins }).ids;
    const given = typeof prompt !== "string" ? prompt : prompt ? read(prompt) : [];
    let ids = [...(state.pending === null ? [] : [state.pending]), ...given];
    if (!ids.length) throw new Error("nothing to go on from: give a prompt");
    const limit = this.manifest.positions_limit ?? Infinity;
    if (state.position + ids.length > limit) throw new Error(`the model's positions end at ${limit}`);
    const stream = new TextStream(this.tokenizer, [...state.last, ...given], prompt ? 0 : state.open);
    for (let made = 0; made < maxTokens; made++) {
      let token;
      for (let start = 0; start < ids.length; start += PIECE) {
        token = await this.step(ids.slice(start, start + PIECE), state);
      }
      state.last = [...state.last, ...(made ? [] : given), token].slice(-CONTEXT - WAITING);
      state.pending = token;
      onToken(token);
      const ended = this.spec.eos_token_ids.includes(token) || state.position >= limit;
      const text = ended ? stream.flush() : stream.push(token);
      state.open = stream.open.length;
      if (text) yield text;
      if (ended) return;
      ids = [token];
    }
  }

  /** Advance a state over ids; the most likely next token. */
  async step(ids, state) {
    const { Tensor } = this.ort;
    const integers = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    const feeds = {
      input_ids: integers(ids),
      position_ids: integers(ids.map((_, at) => state.position + at)),
      attention_mask: integers(ids.map(() => 1)),
      logit_indices: integers([ids.length - 1]),
    };
    state.layers.forEach((layer, at) => {
      feeds[`past_key_values.${at}.recurrent_state`] = new Tensor("float32", layer, this.shape);
    });
    const present = state.layers.map((_, at) => `present.${at}.recurrent_state`);
    const found = await this.session.run(feeds, ["next_tokens", ...present]);
    state.layers = present.map((name) => found[name].data);
    state.position += ids.length;
    state.pending = null;
    return Number(found.next_tokens.data[0]);
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
    const read = (ids) => (ids.length ? (this.tokenizer?.decode(ids, { skip_special_tokens: true }) ?? "") : "");
    const before = read(this.known);
    const whole = read([...this.known, ...this.open]);
    return whole.startsWith(before) ? whole.slice(before.length) : read(this.open);
  }
}
