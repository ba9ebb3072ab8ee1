// What a program with Vercel's AI SDK does. URL and model are its arguments.
import assert from 'node:assert'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'

const [url, model, folder] = process.argv.slice(2)
const installed = createRequire(join(folder, 'package.json'))
const { generateText, streamText, tool, Output } = await import(pathToFileURL(installed.resolve('ai')))
const { createOpenAICompatible } = await import(pathToFileURL(installed.resolve('@ai-sdk/openai-compatible')))
const { z } = await import(pathToFileURL(installed.resolve('zod')))

const provider = createOpenAICompatible({
  name: 'ours', baseURL: `${url}/v1`, apiKey: 'none', includeUsage: true, supportsStructuredOutputs: true
})
const common = { model: provider(model), prompt: 'Hi', maxRetries: 0 }
const paint = tool({ description: 'Paints.', inputSchema: z.object({ colour: z.enum(['red', 'blue']) }) })

const options = { ...common, temperature: 0, maxOutputTokens: 12 }
const whole = await generateText(options)
assert.ok(whole.usage.outputTokens > 0 && whole.usage.outputTokens <= 12)
const streamed = streamText(options)
let text = ''
for await (const piece of streamed.textStream) text += piece
assert.equal(text, whole.text)
assert.equal((await streamed.usage).outputTokens, whole.usage.outputTokens)

const asked = { ...common, tools: { paint }, toolChoice: 'required', seed: 1, maxOutputTokens: 1000 }
const called = await generateText(asked)
assert.equal(called.toolCalls[0].toolName, 'paint')
assert.ok(['red', 'blue'].includes(called.toolCalls[0].input.colour))
const calls = await streamText(asked).toolCalls
assert.deepEqual(calls.map(call => call.input), called.toolCalls.map(call => call.input))

const schema = z.object({ colour: z.enum(['red', 'blue']), count: z.number().int().min(0).max(9) })
const held = await generateText({
  ...common, maxOutputTokens: 1000, output: Output.object({ schema }),
  providerOptions: { ours: { chat_template_kwargs: { enable_thinking: false } } }
})
assert.ok(['red', 'blue'].includes(held.output.colour))

await assert.rejects(generateText({ ...common, model: provider('other') }), error => error.statusCode === 404)
