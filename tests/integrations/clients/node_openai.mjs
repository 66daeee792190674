// both routes, streams, `parse` with zod, `runTools`, errors
import assert from "node:assert";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: process.env.URL, apiKey: "none", maxRetries: 0 });
const ask = { model: "tooled", messages: [{ role: "user", content: "x" }], max_tokens: 200, temperature: 0 };
const whole = await client.chat.completions.create(ask);
let text = "";
for await (const piece of await client.chat.completions.create({ ...ask, stream: true }))
  text += piece.choices[0].delta.content ?? "";
assert.equal(text, whole.choices[0].message.content);
assert.ok((await client.completions.create({ model: "tooled", prompt: "def ", max_tokens: 4 })).choices[0].text);
const form = zodResponseFormat(z.object({ kind: z.enum(["cat", "dog"]) }), "pet");
const parsed = await client.chat.completions.parse({ ...ask, response_format: form });
assert.ok(["cat", "dog"].includes(parsed.choices[0].message.parsed.kind));
const city = { type: "object", properties: { city: { enum: ["Rome", "Oslo"] } }, required: ["city"] };
const called = [];
const parameters = { ...city, additionalProperties: false };
const weather = { name: "weather", description: "Of a city.", parameters };
const given = { ...weather, parse: JSON.parse, function: ({ city }) => called.push(city) };
const choice = { type: "function", function: { name: "weather" } };
const tools = { tools: [{ type: "function", function: given }], tool_choice: choice };
await client.chat.completions.runTools({ ...ask, ...tools }).finalMessage();
assert.ok(["Rome", "Oslo"].includes(called[0]));
await assert.rejects(client.responses.create({ model: "tooled", input: "x" }), /chat\/completions/);
