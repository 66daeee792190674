// What an ONNX file says: the fields of a step graph that web/graph.js reads. The file is a protocol buffer: fields of a number,
// a kind and a value, in each other (https://protobuf.dev/programming-guides/encoding).

/** Kinds of a value: a number of 7 bits a byte; 8 bytes; a length and as many bytes; 4 bytes. */
const VARINT = 0;
const EIGHT = 1;
const BYTES = 2;
const FOUR = 5;

const text = (bytes) => new TextDecoder().decode(bytes);
const float = (bytes) => new DataView(bytes.buffer, bytes.byteOffset).getFloat32(0, true);

/** Tables of messages: number of a field -> its name, how it is read, and whether there may be many. */
const PAIR = { 1: ["key", text], 2: ["value", text] };
const TENSOR = {
  1: ["dims", Number, "many"], 2: ["type", Number], 8: ["name", text], 9: ["raw"], 13: ["external", PAIR, "many"],
};
const ATTRIBUTE = { 1: ["name", text], 2: ["value", float], 3: ["value", Number] };
const NODE = {
  1: ["inputs", text, "many"], 2: ["outputs", text, "many"], 4: ["type", text], 5: ["attributes", ATTRIBUTE, "many"],
  7: ["domain", text],
};
const DIMENSION = { 1: ["size", Number], 2: ["symbol", text] };
const SHAPE = { 1: ["dims", DIMENSION, "many"] };
const VALUE = { 1: ["name", text], 2: ["type", { 1: ["tensor", { 1: ["type", Number], 2: ["shape", SHAPE] }] }] };
const GRAPH = {
  1: ["nodes", NODE, "many"], 5: ["tensors", TENSOR, "many"], 11: ["inputs", VALUE, "many"], 12: ["outputs", VALUE, "many"],
};
const MODEL = { 7: ["graph", GRAPH] };

/**
 * The graph in a file's bytes.
 * @param {Uint8Array} bytes
 * @returns {{nodes: object[], inputs: object[], outputs: object[], tensors: object[]}} nodes: domain, type, inputs and outputs
 *   by name, attributes as an object. inputs and outputs: name, type as ONNX numbers it, dims: numbers and symbols.
 *   tensors: name, type, dims, and raw bytes or location, offset and length.
 * @throws {Error} the bytes are cut, or no ONNX file.
 */
export function readOnnx(bytes) {
  const { graph } = message(bytes, MODEL);
  if (!graph) throw new Error("a graph without nodes: damaged, or no ONNX file");
  const entries = (pairs, value) => Object.fromEntries(pairs.map((pair) => [pair[value[0]], pair[value[1]]]));
  const values = (list) =>
    list.map(({ name, type: { tensor } }) => ({
      name, type: tensor.type, dims: tensor.shape.dims.map(({ size, symbol }) => symbol ?? size ?? 0),
    }));
  return {
    nodes: graph.nodes.map((node) => ({ domain: "", ...node, attributes: entries(node.attributes, ["name", "value"]) })),
    inputs: values(graph.inputs),
    outputs: values(graph.outputs),
    tensors: graph.tensors.map(({ external, ...rest }) => ({ ...rest, ...entries(external, ["key", "value"]) })),
  };
}

function message(bytes, table) {
  const found = {};
  for (const [name, , many] of Object.values(table)) if (many) found[name] = [];
  let at = 0;
  const number = () => {
    let value = 0n;
    for (let shift = 0n; shift < 70n; shift += 7n) {
      const byte = bytes[at++];
      if (byte === undefined) break;
      value |= BigInt(byte & 127) << shift;
      if (byte < 128) return BigInt.asIntN(64, value);
    }
    throw new Error("a graph that is cut");
  };
  while (at < bytes.length) {
    const key = Number(number());
    const kind = key & 7;
    let value;
    if (kind === VARINT) value = number();
    else {
      const length = kind === BYTES ? Number(number()) : { [EIGHT]: 8, [FOUR]: 4 }[kind];
      if (!(length >= 0 && at + length <= bytes.length)) throw new Error("a graph that is cut");
      value = bytes.subarray(at, (at += length));
    }
    const [name, read, many] = table[key >> 3] ?? [];
    if (!name) continue;
    const packed = read === Number && typeof value !== "bigint"; // numbers side by side
    for (const one of packed ? numbers(value) : [value]) {
      const known = typeof read === "function" ? read(one) : read ? message(one, read) : one;
      if (many) found[name].push(known);
      else found[name] = known;
    }
  }
  return found;
}

/** Numbers of 7 bits a byte, as they are packed: none is negative. */
function numbers(bytes) {
  const found = [];
  let value = 0;
  let scale = 1;
  for (const byte of bytes) {
    value += (byte & 127) * scale;
    scale *= 128;
    if (byte < 128) {
      found.push(value);
      value = 0;
      scale = 1;
    }
  }
  return found;
}
