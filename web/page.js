// The page: loads the bundle beside it, streams text, and keeps the state, so that a reload goes on where it was.

import { Model, State } from "./dijiang.js";
import * as store from "./store.js";

const at = (name) => document.getElementById(name);
const query = new URLSearchParams(location.search);

async function start() {
  navigator.serviceWorker?.register("worker.js").catch(() => {}); // a private window may refuse: the page works without
  const began = performance.now();
  const model = await Model.load(new URL("bundle/", location.href).href, {
    provider: query.get("provider") ?? undefined,
    progress: (done, total) => Object.assign(at("progress"), { value: done, max: total }),
  });
  at("progress").hidden = true;
  if (!model.tokenizer) throw new Error("the bundle has no tokenizer: this page has no text to write");
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  say(`${model.provider}, ${model.graph} graph, loaded in ${seconds} s`);
  await resume(model);
}

function say(text) {
  at("status").textContent = text;
}

/** A browser may refuse to keep anything, or have no room: the page goes on, and says so. */
function notKept({ message }) {
  at("status").append(`; the text is not kept: ${message}`);
}

/** Show what was kept, and listen. */
async function resume(model) {
  const name = model.manifest.fingerprint; // pages of one address may have other models
  const kept = await store.load(name).catch(notKept);
  let stamp = kept?.stamp;
  let state = kept ? State.from(kept.state) : model.newState();
  at("text").textContent = kept?.text ?? "";
  if (kept) at("prompt").value = "";
  at("form").onsubmit = async (event) => {
    event.preventDefault();
    busy(true);
    const prompt = at("prompt").value;
    const { textContent: shown } = at("text");
    const { position } = state;
    at("text").append(prompt);
    at("prompt").value = "";
    try {
      await write(model, prompt, state);
    } catch (error) {
      say(error.message);
      if (state.position === position) { // it was not read
        at("text").textContent = shown;
        at("prompt").value = prompt;
      }
    }
    await keep().catch(notKept);
    busy(false);
  };
  const keep = async () => {
    const now = { state: state.toObject(), text: at("text").textContent, stamp: Math.random() };
    if (!(await store.save(name, now, stamp))) throw new Error("another tab has gone on with it; load the page again to see how");
    stamp = now.stamp;
  };
  at("clear").onclick = async () => {
    busy(true);
    await store.remove(name).catch(notKept);
    stamp = undefined;
    state = model.newState();
    at("text").textContent = "";
    busy(false);
  };
  busy(false);
}

function busy(yes) {
  at("write").disabled = at("clear").disabled = yes;
}

async function write(model, prompt, state) {
  let count = 0;
  let first;
  const options = { state, maxTokens: Number(query.get("tokens") ?? 50), onToken: () => (first ??= performance.now(), count++) };
  const written = new Text(); // one node: a browser slows down with thousands
  at("text").append(written);
  for await (const text of model.generate(prompt, options)) written.appendData(text);
  const rate = (1000 * (count - 1)) / (performance.now() - first);
  say(`${model.provider}, ${model.graph} graph, ${count} tokens, ${rate.toFixed(0)} tokens/s`);
}

start().catch((error) => say(error.message));
