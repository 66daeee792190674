// What runs a bundle's native graph here: our kernels on one thread of the CPU. A state lives in their memory between steps.

import { loadCore } from "./core.js";
import { Graph } from "./graph.js";

export class NativeSession {
  /**
   * @param {{source: Uint8Array, weights: Blob, data: string, spec: object, longest: number, builds?: string[]}} parts
   *   source: the graph. weights: the file `data` of the bundle. longest: tokens of a step at most.
   */
  static async open({ source, weights, data, spec, longest, builds }) {
    const read = async (file, from, bytes) => {
      if (file !== data) throw new Error(`${file}: not the weights of this bundle`);
      return new Uint8Array(await weights.slice(from, from + bytes).arrayBuffer());
    };
    const graph = await Graph.load(source, await loadCore(builds), read, { batch: 1, sequences: 1, borders: 2, sequence: longest, kept: 1 });
    return new NativeSession(graph, spec.num_layers);
  }

  constructor(graph, layers) {
    this.graph = graph;
    this.names = Array.from({ length: layers }, (_, at) => `past_key_values.${at}.recurrent_state`);
    this.guest = null;
  }

  /** The layers of the state that is here, where they are. */
  get layers() {
    return this.names.map((name) => this.graph.view(name));
  }

  /** Advance a state over ids; the most likely next token. */
  step(ids, state) {
    const { graph } = this;
    if (this.guest !== state) state.moveInto(this);
    graph.write("input_ids", ids);
    graph.write("position_ids", ids.map((_, at) => state.position + at));
    graph.write("attention_mask", ids.map(() => 1));
    graph.write("logit_indices", [ids.length - 1]);
    if (graph.values.has("sequence_starts")) graph.write("sequence_starts", [0, ids.length]);
    graph.run();
    return Number(graph.view("next_tokens")[0]);
  }
}
