// `generateText`, `streamText`, `generateObject`, `streamObject`, tools, a completion model
import assert from "node:assert";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const common = { name: "dijiang", baseURL: process.env.URL, supportsStructuredOutputs: true, includeUsage: true };
const provider = createOpenAICompatible(common);
const model = provider.chatModel("tooled");
const ask = { model, prompt: "x", maxOutputTokens: 200, temperature: 0, maxRetries: 0 };
const whole = await generateText(ask);
const stream = streamText(ask);
let text = "";
for await (const piece of stream.textStream) text += piece;
assert.equal(text, whole.text);
assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
const schema = z.object({ kind: z.enum(["cat", "dog"]) });
assert.ok((await generateObject({ ...ask, schema })).object.kind);
const objects = streamObject({ ...ask, schema });
for await (const _ of objects.partialObjectStream);
assert.ok((await objects.object).kind);
const called = [];
const inputSchema = z.object({ city: z.enum(["Rome", "Oslo"]) });
const weather = tool({ description: "Of a city.", inputSchema, execute: async ({ city }) => called.push(city) });
const steps = { tools: { weather }, toolChoice: { type: "tool", toolName: "weather" }, stopWhen: stepCountIs(2) };
await generateText({ ...ask, ...steps });
for await (const part of streamText({ ...ask, ...steps }).fullStream) assert.notEqual(part.type, "error");
assert.ok(called.length > 1);
assert.ok((await generateText({ ...ask, model: provider.completionModel("tooled") })).text);
