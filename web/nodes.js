// The nodes of a native graph (NATIVE in dijiang/nodes.py, as its graphs are written): each row plans the calls of one node, after
// it compared the shapes. `g`: the graph that is planned. A row gives its results.

import { expect } from "./graph.js";

const FLOAT = 1;
const INTEGER = 7;
const BRAIN = 16;

const lastOf = (dims) => dims.at(-1) ?? 1;
const leadOf = (dims) => dims.slice(0, -1);

/** The shape of two that are broadcast. */
function broadcast(a, b) {
  const long = a.length >= b.length ? a : b;
  const short = long === a ? b : a;
  return long.map((dim, at) => {
    const other = short[at - long.length + short.length] ?? 1;
    expect(dim === other || dim === 1 || other === 1, `shapes that do not go together: ${a} and ${b}`);
    return dim === 1 ? other : dim;
  });
}

/** Numbers from one row to the next, and from one column to the next, of what is broadcast to `dims`. */
function strides(g, value, dims) {
  const width = lastOf(value.dims);
  const whole = g.same(leadOf(value.dims), leadOf(dims));
  expect(whole || g.same(leadOf(value.dims), []), `a shape that is not known here: ${value.dims} beside ${dims}`);
  return [whole ? width : 0, width === 1 && lastOf(dims) !== 1 ? 0 : 1];
}

/** A row for a node of two floats, or of two integers where the module has that. */
const binary = (name) => (g, [a, b]) => {
  const { core } = g;
  const dims = broadcast(a.dims, b.dims);
  const out = g.result(a.type, dims);
  const [x, y, to] = [g.address(a), g.address(b), out.storage.at];
  if (a.type === INTEGER) {
    const count = g.size(dims);
    expect(`${name}_integers` in core && g.same(a.dims, dims), `${name} of integers that is not known here`);
    const column = g.same(b.dims, dims) ? 1 : 0;
    expect(column || g.same(b.dims, []), `${name} of integers that is not known here`);
    g.call(() => core[`${name}_integers`](count(), x, y, column, to));
  } else {
    const [rows, width] = [g.size(leadOf(dims)), lastOf(dims)];
    const [one, two] = [strides(g, a, dims), strides(g, b, dims)];
    g.call(() => core[name](rows(), width, x, ...one, y, ...two, to));
  }
  return out;
};

/** A row for a function of one number. */
const unary = (name, alpha = () => 0) => (g, [x], attributes) => {
  const out = g.result(FLOAT, x.dims);
  const [count, from, to, factor] = [g.size(x.dims), g.address(x), out.storage.at, alpha(attributes)];
  g.call(() => g.core[name](count(), factor, from, to));
  return out;
};

/** A row for an activation of the kernels, by its number (DIJIANG_ACTIVATIONS in native/step.h). */
const activation = (number) => (g, [x]) => {
  const out = g.result(FLOAT, x.dims);
  const [count, from, to] = [g.size(x.dims), g.address(x), out.storage.at];
  g.call(() => g.core.activation(count(), number, from, to));
  return out;
};

/** A row for a norm without a residual. */
const norm = (centred) => (g, [x, weight, bias], { epsilon, axis }) => {
  const width = lastOf(x.dims);
  expect(axis === -1 && g.same(weight.dims, [width]) && (!bias || g.same(bias.dims, [width])), "a norm: its shapes");
  const out = g.result(FLOAT, x.dims);
  const [zeros, sum] = [g.share(g.zeros, 4 * width), g.share(g.room, 4 * width)];
  const [rows, from, factor, added, to] = [g.size(leadOf(x.dims)), g.address(x), g.address(weight), g.address(bias), out.storage.at];
  g.call(() => g.core.norm(rows(), width, centred, epsilon, from, factor, added, to, zeros.at, sum.at));
  return out;
};

const reshaped = (g, [x, shape]) => {
  const dims = g.integers(shape).map((dim, at) => (dim === 0 ? x.dims[at] : dim));
  const open = dims.indexOf(-1);
  if (open >= 0) {
    const [all, rest] = [g.count(x.dims), g.count(dims.filter((dim) => dim !== -1))];
    dims[open] = all.factor / rest.factor;
    if (all.symbol !== rest.symbol) dims.splice(open, 1, all.symbol, dims[open]);
  }
  expect(g.same(dims, x.dims), `Reshape: ${x.dims} to ${dims}`);
  return g.alias(x, dims);
};

const STANDARD = {
  Add: binary("add"),
  Sub: binary("subtract"),
  Mul: binary("times"),
  Div: binary("divide"),
  Max: binary("largest"),
  Min: binary("smallest"),
  Erf: unary("erf_of"),
  Tanh: unary("tanh_of"),
  Sigmoid: unary("sigmoid"),
  Softplus: unary("softplus"),
  Sqrt: unary("square_root"),
  HardSwish: unary("hard_swish"),
  LeakyRelu: unary("leaky", ({ alpha = 0.01 }) => alpha),
  Relu: activation(1),
  Identity: (g, [x]) => g.alias(x, x.dims),
  LayerNormalization: norm(1),
  RMSNormalization: norm(0),
  Reshape: reshaped,

  Unsqueeze(g, [x, axes]) {
    const dims = [...x.dims];
    for (const axis of g.integers(axes)) dims.splice(axis < 0 ? dims.length + 1 + axis : axis, 0, 1);
    return g.alias(x, dims);
  },

  Cast(g, [x], { to }) {
    const name = { [INTEGER]: "floats_of_integers", [BRAIN]: "floats_of_bfloats" }[x.type];
    expect(to === FLOAT && name, `a Cast from type ${x.type} to type ${to}, which is not known here`);
    const out = g.result(FLOAT, x.dims);
    const [count, from, at] = [g.size(x.dims), g.address(x), out.storage.at];
    g.call(() => g.core[name](count(), from, at));
    return out;
  },

  Gather(g, [table, ids], { axis }) {
    const rest = table.dims.slice(1);
    expect(axis === 0 && table.type === FLOAT && ids.type === INTEGER, "a Gather that is not known here");
    const out = g.result(FLOAT, [...ids.dims, ...rest]);
    const [count, width, from, which, to] = [g.size(ids.dims), g.most(rest), g.address(table), g.address(ids), out.storage.at];
    g.call(() => g.core.gather(count(), width, from, which, to));
    return out;
  },

  /** Rows of one sequence: x [1, rows, width], places [1, count, 1]. */
  GatherND(g, [x, places], { batch_dims }) {
    expect(batch_dims === 1 && x.dims.length === 3 && x.dims[0] === 1 && lastOf(places.dims) === 1, "a GatherND that is not known here");
    return STANDARD.Gather(g, [{ ...x, dims: x.dims.slice(1) }, { ...places, dims: leadOf(places.dims) }], { axis: 0 });
  },

  MatMul(g, [x, weight]) {
    const [inputs, outputs] = weight.dims;
    expect(weight.dims.length === 2 && lastOf(x.dims) === inputs, `MatMul: ${x.dims} by ${weight.dims}`);
    const out = g.result(FLOAT, [...leadOf(x.dims), outputs]);
    const [rows, from, by, to] = [g.size(leadOf(x.dims)), g.address(x), g.address(weight), out.storage.at];
    g.call(() => g.core.multiply(rows(), inputs, outputs, from, by, to));
    return out;
  },

  Concat(g, parts, { axis }) {
    expect(axis === -1 && parts.every((part) => g.same(leadOf(part.dims), leadOf(parts[0].dims))), "a Concat that is not known here");
    const width = parts.reduce((sum, part) => sum + lastOf(part.dims), 0);
    const lead = leadOf(parts[0].dims);
    const [out, rows] = [g.result(FLOAT, [...lead, width]), g.size(lead)];
    let column = 0;
    for (const part of parts) {
      const [from, own, to] = [g.address(part), lastOf(part.dims), out.storage.at + 4 * column];
      g.call(() => g.core.copy_columns(rows(), own, from, own, to, width));
      column += own;
    }
    return out;
  },

  Split(g, [x, widths], { axis }) {
    const [width, lead] = [lastOf(x.dims), leadOf(x.dims)];
    const each = g.integers(widths);
    expect(axis === -1 && each.reduce((a, b) => a + b) === width, "a Split that is not known here");
    const [rows, from] = [g.size(lead), g.address(x)];
    let column = 0;
    return each.map((own) => {
      const out = g.result(FLOAT, [...lead, own]);
      const [start, to] = [from + 4 * column, out.storage.at];
      g.call(() => g.core.copy_columns(rows(), own, start, width, to, own));
      column += own;
      return out;
    });
  },

  ArgMax(g, [x], { axis, keepdims }) {
    expect(axis === -1 && keepdims === 0, "an ArgMax that is not known here");
    const out = g.result(INTEGER, leadOf(x.dims));
    const [rows, width, from, to] = [g.size(leadOf(x.dims)), lastOf(x.dims), g.address(x), out.storage.at];
    g.call(() => g.core.arg_max(rows(), width, from, to));
    return out;
  },
};

const CONTRIB = {
  Gelu: activation(3),
  FastGelu: activation(4),
  QuickGelu: unary("quick_gelu", ({ alpha = 1.702 }) => alpha),

  GatherBlockQuantized(g, [codes, ids, scales], { bits, block_size: block, gather_axis, quantize_axis }) {
    const [length, ...rest] = codes.dims;
    const width = (g.most(rest) * 8) / bits;
    const blocks = Math.ceil(width / block);
    expect(
      gather_axis === 0 && quantize_axis === codes.dims.length - 1 && codes.type === 2 &&
        (bits === 8 || bits === 4) && g.same(scales.dims, [length, blocks]),
      "GatherBlockQuantized: its shapes",
    );
    const out = g.result(FLOAT, [...ids.dims, ...rest.slice(0, -1), lastOf(rest) * (8 / bits)]);
    const [count, from, which, by, to] = [g.size(ids.dims), g.address(codes), g.address(ids), g.address(scales), out.storage.at];
    g.call(() => g.core.gather_codes(count(), width, bits, block, from, which, by, to));
    return out;
  },
};

const OURS = {
  MatMul(g, [x, codes, scales, bias], { K, N, bits, block_size: block, rotation }) {
    const bytes = { [FLOAT]: 4, [BRAIN]: 2 }[scales.type];
    const sizes = [K, N, bits, block, rotation, bytes];
    const { core } = g;
    const packed = core.packed_bytes(...sizes);
    expect(packed, "MatMul: K, N, bits, block_size and rotation do not go together");
    const blocks = Math.ceil(K / block);
    const fits = lastOf(x.dims) === K && codes.type === 2 && codes.tensor && scales.tensor && (!bias || g.same(bias.dims, [N]));
    expect(
      fits && bytes && `${codes.dims}` === `${[N, blocks, (block * bits) / 8]}` && `${scales.dims}` === `${[N, blocks]}`,
      "MatMul: shapes of codes, scales and bias do not fit K and N",
    );
    const lead = leadOf(x.dims);
    const data = g.take(packed).at;
    g.pack(sizes, data, codes, scales);
    const room = g.share(g.room, core.packed_room(...sizes, g.most(lead)));
    const out = g.result(FLOAT, [...lead, N]);
    const [rows, from, added, to] = [g.size(lead), g.address(x), g.address(bias), out.storage.at];
    g.call(() => core.multiply_packed(...sizes, data, rows(), from, added, to, room.at));
    return out;
  },

  AddNorm(g, [a, b, weight, bias], { epsilon, centred }) {
    const width = lastOf(a.dims);
    const fits = g.same(a.dims, b.dims) && g.same(weight.dims, [width]) && (!bias || g.same(bias.dims, [width]));
    expect(fits, "AddNorm: sizes of its inputs");
    const results = [g.result(FLOAT, a.dims), g.result(FLOAT, a.dims)];
    const [rows, ...places] = [g.size(leadOf(a.dims)), ...[a, b, weight, bias, ...results].map((value) => g.address(value))];
    g.call(() => g.core.add_norm(rows(), width, centred, epsilon, ...places));
    return results;
  },

  /** The state is changed where it is. A last input says where sequences begin; here there is one. */
  RecurrentStep(g, given, { num_heads: heads, kv_num_heads: groups, activation: number, epsilon }) {
    const [packed, projection, decay, mask, state, weight, bias, cos, sin, scales] = given;
    const { core } = g;
    const [batch, tokens, width] = packed.dims;
    const size = state.dims[2];
    const mlp = width - (2 * heads + 2 * groups) * size;
    const half = cos ? cos.dims[2] : 0;
    const lead = [batch, tokens];
    expect(
      typeof batch === "number" && groups >= 1 && heads % groups === 0 && size <= core.longest_head() &&
        `${state.dims}` === `${[batch, groups, size, size]}` && mlp >= 0 && (number ? core.is_known_activation(number) : mlp === 0),
      "RecurrentStep: shapes of packed and state",
    );
    const fits = (value, ...last) => !value || g.same(value.dims, [...lead, ...last]);
    expect(2 * half <= size && !cos === !sin && fits(cos, half) && fits(sin, half), "RecurrentStep: rotary angles");
    expect(
      g.same(projection.dims, [size, size]) && g.same(weight.dims, [heads * size]) && g.same(bias.dims, [heads * size]) &&
        fits(decay, groups) && fits(mask, 1) && fits(scales, heads + groups),
      "RecurrentStep: sizes of its inputs",
    );
    const out = g.result(FLOAT, [...lead, heads * size + mlp]);
    const places = [packed, projection, decay, mask, state, weight, bias, cos, sin, scales, out].map((value) => g.address(value));
    const count = g.size([tokens]);
    g.call(() => core.recurrent_step(batch, count(), heads, groups, size, 2 * half, mlp, number, epsilon, ...places));
    return [out, g.alias(state, state.dims)];
  },
};

export const NODES = { "": STANDARD, "com.microsoft": CONTRIB, dijiang: OURS };
