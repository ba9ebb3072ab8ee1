// What a program with OpenAI's client for Node does. URL and model are its arguments.
import assert from 'node:assert'
import { createRequire } from 'node:module'
import { join } from 'node:path'

const [url, model, folder] = process.argv.slice(2)
const OpenAI = createRequire(join(folder, 'package.json'))('openai').default
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'none', maxRetries: 0 })
const messages = [{ role: 'user', content: 'Hi' }]
const parameters = { type: 'object', properties: { colour: { enum: ['red', 'blue'] } }, required: ['colour'] }
const tools = [{ type: 'function', function: { name: 'paint', parameters } }]

assert.deepEqual((await client.models.list()).data.map(one => one.id), [model])

const options = { model, messages, max_tokens: 12, temperature: 0 }
const whole = await client.chat.completions.create(options)
let text = ''
for await (const chunk of await client.chat.completions.create({ ...options, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? ''
}
assert.equal(text, whole.choices[0].message.content ?? '')

const asked = { model, messages, tools, tool_choice: 'required', seed: 1, max_tokens: 1000, parallel_tool_calls: false }
const called = await client.chat.completions.create(asked)
const [call] = called.choices[0].message.tool_calls
assert.ok(['red', 'blue'].includes(JSON.parse(call.function.arguments).colour))
const streamed = await client.chat.completions.stream(asked).finalChatCompletion()
assert.equal(streamed.choices[0].message.tool_calls[0].function.arguments, call.function.arguments)

const json_schema = { name: 'colour', strict: true, schema: { ...parameters, additionalProperties: false } }
const held = await client.chat.completions.create({
  model, messages, max_tokens: 1000, chat_template_kwargs: { enable_thinking: false },
  response_format: { type: 'json_schema', json_schema }
})
assert.ok(['red', 'blue'].includes(JSON.parse(held.choices[0].message.content).colour))

const completion = await client.completions.create({ model, prompt: 'a', max_tokens: 4, echo: true })
assert.equal(completion.choices[0].text[0], 'a')
await assert.rejects(client.chat.completions.create({ ...options, temperature: -1 }), OpenAI.BadRequestError)
await assert.rejects(client.chat.completions.create({ ...options, model: 'other' }), OpenAI.NotFoundError)
