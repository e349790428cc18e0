// What a program for Node does with OpenAI's own client. `test_openai_for_node.py` runs it:
//
//   node openai_client.mjs BASE_URL MODEL TASK
//
// and reads what the task returns, one line of JSON, from the standard output.

import OpenAI, { toFile } from "openai";

const [baseURL, model, task] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const handbook = "The north gate is closed at night. The access code of the north gate is 7421.\n";
const question = "What is the access code of the north gate?";
const messages = [{ role: "user", content: `${handbook} ${question}` }];
const greedy = { model, temperature: 0, max_tokens: 64 };

/** Returns what refuses a call, as the client raises it. */
async function refusal(call) {
  try {
    await call();
  } catch (error) {
    const { status, type, param, code, message } = error;
    return { kind: error.constructor.name, status, type, param, code, message };
  }
  return null;
}

async function upload() {
  const file = await toFile(Buffer.from(handbook), "handbook.txt");
  return client.files.create({ file, purpose: "user_data" });
}

const tasks = {
  async chat() {
    const answer = await client.chat.completions.create({ ...greedy, messages });
    const [{ message, finish_reason }] = answer.choices;
    return { content: message.content, finish_reason, model: answer.model, usage: answer.usage };
  },

  async stream() {
    const options = { stream: true, stream_options: { include_usage: true } };
    const stream = await client.chat.completions.create({ ...greedy, messages, ...options });
    const pieces = [];
    let finish_reason, usage;
    for await (const chunk of stream) {
      const piece = chunk.choices[0]?.delta.content;
      if (piece) pieces.push(piece);
      finish_reason = chunk.choices[0]?.finish_reason ?? finish_reason;
      usage = chunk.usage ?? usage;
    }
    // The client's helper puts chunks together by itself, and throws for those that do not fit.
    const helped = await client.chat.completions.stream({ ...greedy, messages }).finalContent();
    return { pieces, finish_reason, usage, helped };
  },

  /** A stream that is left must not keep the server from answering others. */
  async left() {
    const stream = await client.chat.completions.create({ ...greedy, messages, stream: true });
    for await (const chunk of stream) if (chunk.choices[0]?.delta.content) break;
    return tasks.chat();
  },

  async file() {
    const file = await upload();
    const listed = [];
    for await (const each of client.files.list()) listed.push(each.id);
    const text = await (await client.files.content(file.id)).text();
    const answer = await client.chat.completions.create({
      ...greedy,
      messages: [
        {
          role: "user",
          content: [
            { type: "file", file: { file_id: file.id } },
            { type: "text", text: question },
          ],
        },
      ],
    });
    const input = [
      {
        role: "user",
        content: [
          { type: "input_file", file_id: file.id },
          { type: "input_text", text: question },
        ],
      },
    ];
    const response = await client.responses.create({ model, temperature: 0, input });
    const events = [];
    const streamed = await client.responses.create({ model, temperature: 0, input, stream: true });
    for await (const event of streamed) events.push(event.type);
    const deletion = await client.files.delete(file.id);
    return {
      file,
      listed,
      text,
      answer: answer.choices[0].message.content,
      response: response.output_text,
      events,
      deletion,
      gone: await refusal(() => client.files.retrieve(file.id)),
    };
  },

  async shape() {
    const schema = {
      type: "object",
      properties: { gate: { enum: ["north", "south"] }, open: { type: "boolean" } },
      required: ["gate", "open"],
      additionalProperties: false,
    };
    const json_schema = { name: "gate", schema, strict: true };
    const answer = await client.chat.completions.parse({
      ...greedy,
      messages,
      response_format: { type: "json_schema", json_schema },
    });
    return JSON.parse(answer.choices[0].message.content);
  },

  async wrong() {
    const ask = (more) => refusal(() => client.chat.completions.create({ model, messages, ...more }));
    return {
      unknown: await ask({ temprature: 1 }),
      kind: await ask({ temperature: "hot" }),
      stream: await ask({ top_p: 2, stream: true }),
      model: await ask({ model: "gpt-9" }),
    };
  },
};

console.log(JSON.stringify(await tasks[task]()));
