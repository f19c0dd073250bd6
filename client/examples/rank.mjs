// A search service in another language: KServe v2 as JSON over HTTP, with nothing but Node's own fetch.
//   node client/examples/rank.mjs 127.0.0.1:8000 "coffee grinder" 2309 748 506
const [address, query, ...ids] = process.argv.slice(2);

const tensor = (name, datatype, data) => ({ name, datatype, shape: [1, data.length], data });
const answer = await fetch(`http://${address}/v2/models/rank/infer`, {
  method: "POST",
  body: JSON.stringify({
    inputs: [
      tensor("USER_ID", "INT64", [-1]),
      tensor("ITEM_IDS", "INT64", ids.map((id) => `${BigInt(id)}n`)),
      tensor("TOP_K", "INT32", [10]),
      tensor("SCENARIO", "BYTES", [query ? "search" : "home"]),
      tensor("QUERY", "BYTES", [query]),
    ],
  }).replace(/"(-?\d+)n"/g, "$1"), // an id has up to 63 bits, of which a Number of JavaScript keeps 53
});
const body = JSON.parse((await answer.text()).replace(/(?<=[[,]\s*)-?\d{16,}(?=\s*[,\]])/g, '"$&"'));
if (!answer.ok) throw new Error(`${answer.status}: ${body.error}`); // 400: the message names the value and the limit

const { RANKED_IDS, SCORES } = Object.fromEntries(body.outputs.map((output) => [output.name, output.data]));
RANKED_IDS.map(String).filter((id) => id !== "-1").forEach((id, at) => console.log(at + 1, id, SCORES[at].toFixed(3)));
