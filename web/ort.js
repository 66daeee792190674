// What runs the other graphs of a bundle here: onnxruntime-web, on a GPU or in WebAssembly.

export class OrtSession {
  /** @param {{ort: object, provider: string, source: Uint8Array, weights: Blob, data: string, shape: number[], threads?: number}} parts */
  static async open({ ort, provider, source, weights, data, shape, threads }) {
    ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? (threads ?? navigator.hardwareConcurrency) : 1;
    const bytes = new Uint8Array(await weights.arrayBuffer());
    const options = { executionProviders: [provider], externalData: [{ path: data, data: bytes }] };
    return new OrtSession(ort, await ort.InferenceSession.create(source, options), shape);
  }

  constructor(ort, session, shape) {
    Object.assign(this, { ort, session, shape });
  }

  /** Gives its memory back. */
  async close() {
    await this.session.release();
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
    const { layers } = state;
    layers.forEach((layer, at) => {
      feeds[`past_key_values.${at}.recurrent_state`] = new Tensor("float32", layer, this.shape);
    });
    const present = layers.map((_, at) => `present.${at}.recurrent_state`);
    const found = await this.session.run(feeds, ["next_tokens", ...present]);
    state.layers = present.map((name) => found[name].data);
    return Number(found.next_tokens.data[0]);
  }
}
