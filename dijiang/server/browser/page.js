// The page of `dijiang serve`. What the server and its models say becomes text of the page, never HTML.

const byId = (id) => document.getElementById(id);
const copyOf = (id) => byId(id).content.firstElementChild.cloneNode(true);

// Asking the server.

let key = ""; // of the API, in memory only

/** What the server refused, in its own words. */
class Refusal extends Error {
  constructor(message, status, code) {
    super(message);
    Object.assign(this, { status, code });
  }
}

/** The response to a request; a Refusal if it is none of success. */
async function ask(path, body, signal) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const request = { headers, signal, ...(body && { method: "POST", body: JSON.stringify(body) }) };
  const response = await fetch(path, request).catch((error) => {
    throw signal?.aborted ? error : new Refusal("The server does not answer. See whether it runs, then try again.");
  });
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  const wait = response.headers.get("Retry-After");
  const message = error?.message ?? `The server answers with status ${response.status}.`;
  throw new Refusal(wait ? `${message} (in ${wait} s or more)` : message, response.status, error?.code);
}

/** The pieces of a stream; a Refusal if it ends before its end. */
async function* pieces(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read().catch((error) => {
      if (signal.aborted) throw error;
      return { done: true };
    });
    if (done) throw new Refusal("The answer broke off. See whether the server runs, then go on.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const piece = JSON.parse(data);
      if (piece.error) throw new Refusal(piece.error.message, 200, piece.error.code);
      yield piece;
    }
  }
}

/** The body of a request for the answer to the last of some turns. Only those are sent that no stored answer covers. */
function bodyOf({ model, chat, system }, turns, options) {
  const stored = turns.findLastIndex((turn) => turn.id);
  const fresh = turns.slice(stored + 1);
  const body = { model: model.id, ...options, store: true, stream: true };
  body.stream_options = { include_usage: true, continuous_usage_stats: true };
  if (stored >= 0) body.previous_response_id = turns[stored].id;
  if (!chat) return { ...body, prompt: fresh.map((turn) => turn.question + turn.answer).join("") };
  const said = fresh.flatMap((turn) => [["user", turn.question], ["assistant", turn.answer]]).slice(0, -1);
  if (stored < 0 && system) said.unshift(["system", system]);
  return { ...body, messages: said.map(([role, content]) => ({ role, content })) };
}

// Settings. Model, mode and system message are those of a whole conversation, from its first question on.

let models = [];
let conversation = null;

const chats = () => byId("mode").value === "chat";
const chosenModel = () => models.find((model) => model.id === byId("model").value);

/** Show what the chosen model can do, and its options. */
function showModel() {
  const { chat, options } = chosenModel().dijiang;
  byId("mode").options[0].disabled = !chat;
  byId("mode").value = chat ? "chat" : "text";
  byId("options").replaceChildren(
    ...options.map((option) => {
      const label = copyOf("option");
      const [name, input, help] = label.children;
      name.textContent = option.name.replaceAll("_", " ");
      help.textContent = option.help;
      // Larger numbers are not exact here.
      const high = option.whole ? Math.min(option.high ?? Infinity, Number.MAX_SAFE_INTEGER) : option.high;
      const bounds = { min: option.low ?? "", max: high ?? "", step: option.whole ? 1 : "any" };
      Object.assign(input, { name: option.name, value: option.default ?? "", ...bounds });
      return label;
    }),
  );
  showMode();
}

function showMode() {
  byId("system-label").hidden = !chats();
  byId("branches").classList.toggle("code", !chats());
  for (const branch of branches) branch.show();
}

/** The options of a generation; null, and the browser says why, where one is out of range. */
function chosenOptions() {
  const form = byId("settings");
  if (!form.checkValidity()) {
    form.querySelector("details").open = true;
    form.reportValidity();
    return null;
  }
  const given = [...form.querySelectorAll("#options input")].filter((input) => input.value !== "");
  return Object.fromEntries(given.map((input) => [input.name, input.valueAsNumber]));
}

/** Settings that a conversation keeps cannot be changed while there is one. */
function showSettings() {
  const begun = branches.some((branch) => branch.turns.length);
  if (!begun) conversation = null;
  for (const id of ["fixed", "system"]) byId(id).disabled = begun;
}

// Branches: turns, each with what was asked and what came. Forks share the turns before the fork.

const NAMES = ["A", "B"];
let branches = [];

const megabytes = (bytes) => `${(bytes / 1e6).toLocaleString("en", { maximumSignificantDigits: 3 })} MB`;
const counted = (count) => `${count.toLocaleString("en")} ${count === 1 ? "token" : "tokens"}`;

class Branch {
  /** turns: of the branch that it comes from. question: what is to be asked next. */
  constructor(name, turns = [], question = "") {
    Object.assign(this, { name, turns, stopper: null, box: copyOf("branch") });
    this.shared = turns.length;
    const find = (selector) => this.box.querySelector(selector);
    this.log = find(".log");
    this.input = find("textarea");
    this.input.value = question;
    find("h2").textContent = `Branch ${name}`;
    find(".ask span").textContent = `Prompt for branch ${name}`;
    this.log.setAttribute("aria-label", `Text of branch ${name}`);
    this.box.setAttribute("aria-label", `Branch ${name}`);
    find(".ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    find(".stop").addEventListener("click", () => this.stop());
    find(".close").setAttribute("aria-label", `Close branch ${name}`);
    find(".close").addEventListener("click", () => closeBranch(this));
    this.box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.stop();
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.target !== this.input) return;
      event.preventDefault();
      this.send();
    });
    this.log.append(...turns.map((turn, at) => this.article(turn, at)));
    this.show();
  }

  stop() {
    this.stopper?.abort();
  }

  say(selector, text) {
    this.box.querySelector(selector).textContent = text;
  }

  /** Ask what stands in the box, and show the answer as it comes. */
  async send() {
    const options = this.stopper ? null : chosenOptions();
    if (!options || (chats() && !this.input.value.trim())) return;
    conversation ??= { model: chosenModel(), chat: chats(), system: byId("system").value };
    const turn = { question: this.input.value, answer: "", note: "" };
    this.stopper = new AbortController();
    this.turns.push(turn);
    this.log.append(this.article(turn, this.turns.length - 1));
    this.input.value = "";
    this.say(".trouble", "");
    this.say(".status", "Answering");
    this.show();
    this.log.scrollTop = this.log.scrollHeight;
    try {
      await this.answer(turn, options, this.stopper.signal);
    } catch (error) {
      this.broke(turn, error, this.stopper.signal.aborted);
    }
    this.stopper = null;
    this.say(".status", turn.note);
    this.show();
  }

  /** Take in the answer to the last turn. It is stored if it comes to its end. */
  async answer(turn, options, signal) {
    const response = await this.response(options, signal);
    let first = 0, id = null;
    for await (const { id: name, choices, usage } of pieces(response, signal)) {
      const now = performance.now();
      id = name;
      turn.answer += choices[0]?.delta?.content ?? choices[0]?.text ?? "";
      if (!usage) continue;
      first ||= now;
      if (choices.length) turn.seconds = (now - first) / 1000;
      turn.usage = usage;
      turn.note = noteOf(turn);
      this.showSoon();
    }
    turn.id = id;
  }

  /** The server's response. A stored answer that it has forgotten is sent again as text. */
  async response(options, signal) {
    const path = conversation.chat ? "v1/chat/completions" : "v1/completions";
    try {
      return await ask(path, bodyOf(conversation, this.turns, options), signal);
    } catch (error) {
      if (error.code !== "previous_response_not_found") throw error;
      this.turns.findLast((turn) => turn.id).id = null;
      return this.response(options, signal);
    }
  }

  /** An answer did not come to its end: keep what came, or take the question back. */
  broke(turn, error, stopped) {
    if (!stopped && !(error instanceof Refusal)) throw error;
    if (turn.answer) {
      turn.note = `${stopped ? "Stopped" : "Broken off"} after ${turn.note}`;
    } else {
      this.turns.pop();
      this.log.lastElementChild.remove();
      this.input.value ||= turn.question;
      turn.note = stopped ? "Stopped before the first token" : "Not answered";
    }
    if (!stopped) this.say(".trouble", error.message);
    if (error.status === 401) openGate();
  }

  article(turn, at) {
    const box = copyOf("turn");
    const shared = at < this.shared;
    box.setAttribute("aria-label", `Turn ${at + 1} of branch ${this.name}${shared ? ", from before the fork" : ""}`);
    box.classList.toggle("shared", shared);
    for (const part of ["question", "answer"]) box.querySelector(`.${part}`).append(new Text(turn[part]));
    const fork = (selector, before, question) => {
      const button = box.querySelector(selector);
      button.setAttribute("aria-label", `${button.textContent}, turn ${at + 1} of branch ${this.name}`);
      button.addEventListener("click", () => openBranch(this.turns.slice(0, before), question));
    };
    fork(".again", at, turn.question);
    fork(".fork", at + 1, "");
    return box;
  }

  /** Show at the next picture of the screen: tokens may come faster. */
  showSoon() {
    this.picture ??= requestAnimationFrame(() => this.showLast());
  }

  /** Show what came to the last turn. It costs the same however many turns there are. */
  showLast() {
    if (this.picture) cancelAnimationFrame(this.picture);
    this.picture = null;
    const last = this.turns.at(-1), article = this.log.lastElementChild;
    const follows = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 60;
    if (last) {
      const text = article.querySelector(".answer").firstChild;
      text.appendData(last.answer.slice(text.length));
      article.querySelector(".note").textContent = last.note;
    }
    if (follows) this.log.scrollTop = this.log.scrollHeight;
    this.showSizes(last?.usage?.total_tokens ?? 0);
  }

  show() {
    const busy = this.stopper !== null, newest = this.log.lastElementChild;
    for (const box of this.log.children) {
      const waits = busy && box === newest;
      box.setAttribute("aria-busy", waits); // a screen reader reads the answer when it is whole
      box.querySelector(".forks").hidden = waits || branches.length === NAMES.length;
    }
    this.showLast();
    this.log.dataset.empty = `Nothing yet. ${chats() ? "Ask something." : "Begin a text."}`;
    this.swap(busy);
    this.box.querySelector(".close").hidden = branches.length < 2;
    showSettings();
  }

  /** Show the button that does something now; the keyboard's focus goes with it. */
  swap(busy) {
    const [on, off] = [".stop", ".send"].map((name) => this.box.querySelector(name));
    const held = document.activeElement === (busy ? off : on);
    on.hidden = !busy;
    off.hidden = busy;
    if (held) (busy ? on : this.input).focus();
  }

  /** The state beside a cache of keys and values after so many tokens, by what the server says of the model. */
  showSizes(length) {
    const { state_bytes, cache_bytes_per_token, cache_larger_from } = (conversation?.model ?? chosenModel()).dijiang;
    const bytes = { state: state_bytes, cache: length * cache_bytes_per_token };
    const most = Math.max(...Object.values(bytes));
    for (const [name, size] of Object.entries(bytes)) {
      this.say(`.${name} .bytes`, megabytes(size));
      this.box.querySelector(`.${name} .bar`).replaceChildren(bar(size / most));
    }
    this.say("caption", `Memory after ${counted(length)}. A cache is larger from ${counted(cache_larger_from)} on.`);
  }
}

/** What an answer took. */
function noteOf({ usage, seconds }) {
  const { prompt_tokens, completion_tokens, prompt_tokens_details: details } = usage;
  const speed = seconds > 0 ? `, ${((completion_tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
  return `${counted(completion_tokens)}${speed}; ${counted(prompt_tokens - details.cached_tokens)} of prompt fed`;
}

/** A bar from 0 to 1; the number beside it says the same. */
function bar(share) {
  const make = (name, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const picture = make("svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true" });
  picture.append(make("rect", { width: share, height: 1 }));
  return picture;
}

/** Open a branch after some turns, beside the one that is there. */
function openBranch(turns = [], question = "") {
  const name = NAMES.find((one) => branches.every((branch) => branch.name !== one));
  const branch = new Branch(name, turns, question);
  branches.push(branch);
  byId("branches").append(branch.box);
  for (const one of branches) one.show();
  branch.log.scrollTop = branch.log.scrollHeight;
  branch.input.focus();
}

function closeBranch(branch) {
  branch.stop();
  branches = branches.filter((one) => one !== branch);
  branch.box.remove();
  for (const one of branches) one.show();
  branches[0]?.input.focus();
}

function restart() {
  for (const branch of [...branches]) closeBranch(branch);
  openBranch();
}

// The start.

function openGate() {
  byId("gate").hidden = false;
  byId("key").focus();
}

/** Learn what is served; a server with a key is asked again with it. */
async function start() {
  byId("trouble").textContent = "";
  try {
    const { data } = await (await ask("v1/models")).json();
    byId("gate").hidden = true;
    if (!branches.length) begin(data.filter((model) => model.dijiang.text));
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (error.status !== 401) byId("trouble").textContent = error.message;
    else if (key) byId("trouble").textContent = "The server does not take this key.";
    if (error.status === 401) openGate();
  }
}

function begin(found) {
  if (!found.length) {
    byId("trouble").textContent = "No model here has a tokenizer, so none can be asked by text. The API takes token ids.";
    return;
  }
  models = found;
  byId("model").replaceChildren(...models.map((model) => new Option(model.id)));
  showModel();
  byId("settings").hidden = false;
  openBranch();
}

byId("gate").addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("key").value;
  byId("key").value = "";
  start();
});
byId("settings").addEventListener("submit", (event) => event.preventDefault());
byId("model").addEventListener("change", showModel);
byId("mode").addEventListener("change", showMode);
byId("fresh").addEventListener("click", restart);
start();
