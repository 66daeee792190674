// A native graph, planned once: every value has a place in the memory of the module (web/core.js), and every node is a call of one
// of its functions (web/nodes.js). Weights are read once, straight into that memory.

import { NODES } from "./nodes.js";
import { readOnnx } from "./onnx.js";

/** Bytes of an element, by ONNX's number of its type: float32, uint8, int64, bfloat16. */
const BYTES = { 1: 4, 2: 1, 7: 8, 16: 2 };
const VIEWS = { 1: Float32Array, 7: BigInt64Array };
/** Bytes of weights that are on their way at once. */
const SLAB = 1 << 22;
const PAGE = 1 << 16;
const ALIGNED = 64;

/** An error unless a graph fits what is asked of it. */
export function expect(fits, message) {
  if (!fits) throw new Error(message);
}

export class Graph {
  /**
   * Plan a graph and load its weights.
   * @param {Uint8Array} source the ONNX file.
   * @param {WebAssembly.Exports} core a module that nobody uses yet.
   * @param {(file: string, from: number, bytes: number) => Promise<Uint8Array>} read a part of a file of weights.
   * @param {Record<string, number>} longest symbol of a dimension -> its largest size. One that is not in it is 2 at most.
   * @throws {Error} a node or a shape that is not known here, weights that are cut, no memory.
   */
  static async load(source, core, read, longest) {
    const graph = new Graph(core, longest);
    graph.#plan(readOnnx(source));
    await graph.#load(read);
    return graph;
  }

  constructor(core, longest) {
    this.core = core;
    this.longest = { ...longest };
    this.sizes = { ...longest };
    this.top = core.__heap_base.value;
    /** Where a call works, and a row of zeros. */
    this.room = { bytes: 0 };
    this.zeros = { bytes: 0 };
    this.values = new Map();
    this.calls = [];
    this.once = []; // calls on constants
    this.loads = [];
    this.free = [];
  }

  /** The numbers of an input or output, where they are. Of an output: those of the last run. */
  view(name) {
    const value = this.values.get(name);
    return new VIEWS[value.type](this.core.memory.buffer, value.storage.at, this.size(value.dims)());
  }

  /** Give an input its numbers. An open size is as large as they are. */
  write(name, numbers) {
    const { type, dims } = this.values.get(name);
    const { factor, symbol } = this.count(dims);
    const size = numbers.length / factor;
    expect(!symbol || size <= this.longest[symbol], `${name}: ${size} at once, expected at most ${this.longest[symbol]}`);
    if (symbol) this.sizes[symbol] = size;
    const view = this.view(name);
    expect(view.length === numbers.length, `${name}: ${numbers.length} numbers, expected ${view.length}`);
    view.set(type === 7 ? BigInt64Array.from(numbers, BigInt) : numbers);
  }

  run() {
    for (const call of this.calls) call();
  }

  // What web/nodes.js plans with.

  /** How many numbers: a factor, and the symbol that it is multiplied by. */
  count(dims) {
    const symbols = dims.filter((dim) => typeof dim === "string");
    expect(symbols.length <= 1, `a shape with two open sizes: ${dims}`);
    return { factor: dims.filter((dim) => typeof dim === "number").reduce((a, b) => a * b, 1), symbol: symbols[0] };
  }

  /** The same as a function, for the time of a call. */
  size(dims) {
    const { factor, symbol } = this.count(dims);
    return symbol ? () => factor * this.sizes[symbol] : () => factor;
  }

  same(a, b) {
    const [one, two] = [this.count(a), this.count(b)];
    return one.factor === two.factor && one.symbol === two.symbol;
  }

  most(dims) {
    const { factor, symbol } = this.count(dims);
    return factor * (symbol ? this.longest[symbol] : 1);
  }

  /** A new value; a constant if it is made of constants. */
  result(type, dims) {
    const bytes = this.most(dims) * BYTES[type];
    return { type, dims, constant: this.folding, storage: this.folding ? this.take(bytes) : this.pooled(bytes) };
  }

  /** The same numbers in another shape. */
  alias(value, dims) {
    this.address(value);
    return { type: value.type, dims, constant: value.constant, storage: value.storage };
  }

  call(run) {
    (this.folding ? this.once : this.calls).push(run);
  }

  /** Where a value is; 0: it is left out. Constants get a place when they are first asked for. */
  address(value) {
    if (!value) return 0;
    if (!value.storage) {
      value.storage = this.take(this.most(value.dims) * BYTES[value.type]);
      this.loads.push((read) => this.#fill(read, value.tensor, value.storage.at));
    }
    return value.storage.at;
  }

  /** The integers of a constant that is in the graph itself. */
  integers({ type, tensor }) {
    expect(type === 7 && tensor?.raw, "integers that are no constant of the graph");
    return Array.from(new BigInt64Array(tensor.raw.slice().buffer), Number);
  }

  /** A place for good. */
  take(bytes) {
    const at = Math.ceil(this.top / ALIGNED) * ALIGNED;
    this.top = at + bytes;
    return { at, bytes };
  }

  /** A place that others use when the value is not needed any more. */
  pooled(bytes) {
    const fitting = this.free.filter((place) => place.bytes >= bytes).sort((a, b) => a.bytes - b.bytes)[0];
    if (!fitting) return { ...this.take(bytes), pooled: true, users: 0 };
    this.free.splice(this.free.indexOf(fitting), 1);
    return fitting;
  }

  /** Room that calls share: at least so many bytes at `place.at`. */
  share(place, bytes) {
    place.bytes = Math.max(place.bytes, bytes);
    return place;
  }

  /**
   * Pack a weight of integers when it is loaded, some outputs at a time.
   * @param {number[]} sizes the first arguments of the module's `pack`.
   */
  pack(sizes, data, codes, scales) {
    const [, outputs] = sizes;
    const row = { codes: this.most(codes.dims) / outputs, scales: (this.most(scales.dims) / outputs) * BYTES[scales.type] };
    const together = Math.max(16, Math.floor(SLAB / row.codes / 16) * 16);
    const stage = Math.min(together, outputs) * (row.codes + row.scales) + ALIGNED;
    this.share(this.room, stage);
    this.loads.push(async (read) => {
      for (let first = 0; first < outputs; first += together) {
        const count = Math.min(together, outputs - first);
        const at = this.room.at + count * row.scales;
        await this.#fill(read, scales.tensor, this.room.at, first * row.scales, count * row.scales);
        await this.#fill(read, codes.tensor, at, first * row.codes, count * row.codes);
        const packed = this.core.pack(...sizes, data, first, count, at, this.room.at);
        expect(packed, `${scales.tensor.name}: a scale is 0 or no number; export the bundle again`);
      }
    });
  }

  // What `load` does.

  #plan({ nodes, inputs, outputs, tensors }) {
    for (const tensor of tensors) {
      expect(tensor.type in BYTES, `${tensor.name}: type ${tensor.type}, which is not known here`);
      this.values.set(tensor.name, { type: tensor.type, dims: tensor.dims, constant: true, tensor });
    }
    for (const { name, type, dims } of inputs) {
      for (const dim of dims) if (typeof dim === "string") this.sizes[dim] = this.longest[dim] ??= 2;
      const known = dims.map((dim) => (this.longest[dim] === 1 ? 1 : dim));
      this.values.set(name, { type, dims: known, storage: this.take(this.most(known) * BYTES[type]) });
    }
    const uses = new Map();
    for (const name of [...nodes.flatMap((node) => node.inputs), ...outputs.map((output) => output.name)]) {
      uses.set(name, (uses.get(name) ?? 0) + 1);
    }
    const done = (value) => {
      const { storage } = value;
      if (storage?.pooled && --storage.users === 0) this.free.push(storage);
    };
    for (const node of nodes) {
      const plan = NODES[node.domain]?.[node.type];
      expect(plan, `a node ${node.domain} ${node.type}, which is not known here`);
      const given = node.inputs.map((name) => this.values.get(name));
      this.folding = given.every((value) => !value || value.constant);
      const made = [plan(this, given, node.attributes)].flat();
      for (const value of made) if (value.storage.pooled) value.storage.users++;
      node.outputs.forEach((name, at) => this.values.set(name, made[at]));
      made.forEach((value, at) => uses.has(node.outputs[at]) || done(value));
      for (const name of node.inputs.filter(Boolean)) {
        uses.set(name, uses.get(name) - 1);
        if (uses.get(name) === 0) done(this.values.get(name));
      }
    }
    for (const place of [this.room, this.zeros]) place.at = this.take(place.bytes).at;
  }

  async #load(read) {
    const { memory } = this.core;
    try {
      memory.grow(Math.max(0, Math.ceil((this.top - memory.buffer.byteLength) / PAGE)));
    } catch {
      throw new Error(`no memory: ${Math.ceil(this.top / 1e6)} MB are needed`);
    }
    for (const load of this.loads) await load(read);
    for (const call of this.once) call();
  }

  /** Bytes of a stored tensor, to an address. */
  async #fill(read, tensor, at, from = 0, bytes = this.most(tensor.dims) * BYTES[tensor.type]) {
    for (let done = 0; done < bytes; ) {
      const start = from + done;
      const length = Math.min(SLAB, bytes - done);
      const part = tensor.raw
        ? tensor.raw.subarray(start, start + length)
        : await read(tensor.location, Number(tensor.offset) + start, length);
      expect(part.length === length, `${tensor.location ?? "the graph"} is cut: ${tensor.name} is not whole`);
      new Uint8Array(this.core.memory.buffer).set(part, at + done);
      done += length;
    }
  }
}
