//! Stored responses: who is asked for one, as long as it is remembered and after.

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::support::{
    Proxy, ProxyBuilder, Variant, Worker, answer, json_answer, proxy, script, variants, worker,
    worker::{Request, Script, chunk, sse_head},
};

const PATH: &str = "/v1/responses";

/// What a worker has stored.
type Store = Arc<Mutex<Vec<String>>>;

/// A worker that stores responses as vLLM does, and what it has stored; the ids that it makes begin with `name`. How
/// it sends a stream is said by `send`.
fn keeper(name: &'static str, send: fn(Vec<u8>) -> Script) -> (Worker, Store) {
    let store = Store::default();
    let own = store.clone();
    let mock = worker().on_request("*", move |request| {
        let mut store = own.lock().unwrap();
        let asked = request.json();
        let has = |id: &str| store.iter().any(|stored| stored == id);
        let id = request.path().trim_start_matches(PATH).trim_matches('/').trim_end_matches("/cancel");
        let previous = asked["previous_response_id"].as_str();
        if let Some(wanted) = Some(id).filter(|id| !id.is_empty()).or(previous)
            && !has(wanted)
        {
            return script().send(missing(wanted));
        }
        if request.method == "GET" || !id.is_empty() {
            return script().send(json_answer(response(id).to_string()));
        }
        let id = format!("{name}{}", store.len());
        if asked["store"] != json!(false) {
            store.push(id.clone());
        }
        if asked["stream"] == json!(true) {
            send(stream(&id))
        } else {
            script().send(json_answer(response(&id).to_string()))
        }
    });
    (mock.start(), store)
}

fn missing(id: &str) -> Vec<u8> {
    let message = format!("Response with id '{id}' not found.");
    let error =
        json!({"error":{"message":message,"type":"invalid_request_error","param":"response_id","code":404}});
    answer("404 Not Found", "application/json", "", error.to_string())
}

fn response(id: &str) -> Value {
    json!({"id":id,"created_at":1_795_252_223,"object":"response","output":[{"id":"msg_1","type":"message"}],
        "tools":[],"status":"completed"})
}

fn stream(id: &str) -> Vec<u8> {
    let mut bytes = sse_head().into_bytes();
    for kind in ["response.created", "response.in_progress", "response.completed"] {
        let data = json!({"response":response(id),"sequence_number":0,"type":kind});
        bytes.extend(chunk(format!("event: {kind}\ndata: {data}\n\n")));
    }
    bytes.extend(b"0\r\n\r\n");
    bytes
}

/// Three of them, and a proxy before them.
fn three(v: Variant) -> ([(Worker, Store); 3], Proxy) {
    let keepers = ["resp_a", "resp_b", "resp_c"].map(|name| keeper(name, |bytes| script().send(bytes)));
    let proxy = before(v, &keepers).start();
    (keepers, proxy)
}

fn before(v: Variant, keepers: &[(Worker, Store)]) -> ProxyBuilder {
    keepers.iter().fold(proxy(v), |proxy, (worker, _)| proxy.worker(worker)).arg("--policy", "round_robin")
}

/// The id of the response that the answer to `body` is.
fn made(proxy: &Proxy, body: &str) -> String {
    let answer = proxy.post(PATH, body).expect(200);
    let text = answer.text();
    let data = text.split_once("data: ").map_or(text, |(_, data)| data.lines().next().unwrap());
    let value: Value = serde_json::from_str(data).unwrap();
    let id = value["response"]["id"].as_str().or(value["id"].as_str());
    id.expect("a response has an id").to_owned()
}

/// The keeper that has stored it.
fn holder<'a>(keepers: &'a [(Worker, Store)], id: &str) -> &'a (Worker, Store) {
    let holds = |(_, store): &&(Worker, Store)| store.lock().unwrap().iter().any(|stored| stored == id);
    keepers.iter().find(holds).expect("somebody has stored it")
}

/// Method and path of what the workers got, and forgets it.
fn taken<'a>(workers: impl IntoIterator<Item = &'a Worker>) -> Vec<String> {
    let line = |request: Request| format!("{} {}", request.method, request.path());
    let lines = |worker: &'a Worker| {
        let requests = worker.requests();
        worker.forget();
        requests.into_iter().map(line)
    };
    workers.into_iter().flat_map(lines).collect()
}

fn workers(keepers: &[(Worker, Store)]) -> impl Iterator<Item = &Worker> {
    keepers.iter().map(|(worker, _)| worker)
}

const PLAIN: &str = r#"{"model":"m","input":"hi"}"#;
const STREAMED: &str = r#"{"model":"m","input":"hi","stream":true}"#;

variants! {
    fn only_the_worker_that_stored_a_response_is_asked_for_it(v: Variant) {
        let (keepers, proxy) = three(v);
        for body in [PLAIN, STREAMED, PLAIN, STREAMED] {
            let id = made(&proxy, body);
            assert_eq!(taken(workers(&keepers)), [format!("POST {PATH}")]);
            let (holder, _) = holder(&keepers, &id);
            assert_eq!(proxy.get(&format!("{PATH}/{id}")).expect(200).json()["id"], json!(id));
            let get = format!("GET {PATH}/{id}");
            assert_eq!((taken([holder]), taken(workers(&keepers))), (vec![get.clone()], vec![]));
            proxy.post(&format!("{PATH}/{id}/cancel"), "").expect(200);
            let both = vec![get, format!("POST {PATH}/{id}/cancel")];
            assert_eq!((taken([holder]), taken(workers(&keepers))), (both, vec![]));
        }
    }

    fn a_response_that_continues_another_is_remembered_as_well(v: Variant) {
        let (keepers, proxy) = three(v);
        let mut id = made(&proxy, PLAIN);
        let (holder, store) = holder(&keepers, &id);
        for stream in [true, false, true, false] {
            taken(workers(&keepers));
            let next = made(&proxy, &json!({"model":"m","previous_response_id":id,"stream":stream}).to_string());
            assert_eq!((taken([holder]), taken(workers(&keepers))), (vec![format!("POST {PATH}")], vec![]));
            assert!(next != id && store.lock().unwrap().contains(&next));
            id = next;
        }
        let unstored = made(&proxy, &json!({"previous_response_id":id,"store":false}).to_string());
        assert_eq!(proxy.holder_of(&unstored), None);
    }

    fn who_has_forgotten_a_response_is_one_of_many(v: Variant) {
        let (keepers, proxy) = three(v);
        let id = made(&proxy, PLAIN);
        let (first, _) = holder(&keepers, &id);
        keepers.iter().for_each(|(_, store)| store.lock().unwrap().clear());
        taken(workers(&keepers));
        let answer = proxy.get(&format!("{PATH}/{id}")).expect(404);
        assert_eq!(answer.json()["error"]["param"], json!("response_id"));
        assert_eq!(taken(workers(&keepers)), vec![format!("GET {PATH}/{id}"); 3], "each of them once");
        let (second, store) = keepers.iter().find(|(worker, _)| worker.addr() != first.addr()).unwrap();
        store.lock().unwrap().push(id.clone());
        proxy.get(&format!("{PATH}/{id}")).expect(200);
        assert_eq!(proxy.holder_of(&id), Some(second.url()), "who has it now is remembered");
        taken(workers(&keepers));
        proxy.post(PATH, json!({"previous_response_id":id}).to_string()).expect(200);
        assert_eq!(taken([second]), [format!("POST {PATH}")]);
        // who was asked beside the second one may come to it after that has answered for both
        let mut others = taken(workers(&keepers));
        others.retain(|request| !request.starts_with("GET"));
        assert_eq!(others, [""; 0]);
        // and again, where it is a request that finds out
        keepers.iter().for_each(|(_, store)| store.lock().unwrap().clear());
        let known = [first.addr(), second.addr()];
        let (third, store) = keepers.iter().find(|(worker, _)| !known.contains(&worker.addr())).unwrap();
        store.lock().unwrap().push(id.clone());
        proxy.post(PATH, json!({"previous_response_id":id}).to_string()).expect(200);
        let mut asked = taken([third]);
        asked.dedup();
        assert_eq!(asked, [format!("GET {PATH}/{id}"), format!("POST {PATH}")]);
        assert_eq!(taken([second]), [format!("POST {PATH}"), format!("GET {PATH}/{id}")]);
        assert_eq!(proxy.holder_of(&id), Some(third.url()));
    }

    fn a_response_of_a_worker_that_is_gone_is_looked_for_elsewhere(v: Variant) {
        let (keepers, proxy) = three(v);
        let id = made(&proxy, PLAIN);
        let (first, _) = holder(&keepers, &id);
        let (second, store) = keepers.iter().find(|(worker, _)| worker.addr() != first.addr()).unwrap();
        first.go_down();
        proxy.get(&format!("{PATH}/{id}")).expect(404);
        store.lock().unwrap().push(id.clone());
        for line in ["GET", "POST"] {
            taken([second]);
            let target = if line == "GET" { format!("{PATH}/{id}") } else { format!("{PATH}/{id}/cancel") };
            proxy.client().request(line, &target, "", b"").expect(200);
            assert_eq!(taken([second]).last(), Some(&format!("{line} {target}")));
        }
    }

    fn the_id_is_read_however_it_comes(v: Variant) {
        // every byte for itself; and each in a chunk of its own
        let bytewise = keeper("resp_a", |bytes| script().send_bytewise(bytes));
        let torn = keeper("resp_b", |bytes| {
            let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
            let whole = stream_data(&bytes[end..]);
            let chunks = whole.iter().flat_map(|byte| chunk([*byte]));
            script().send(bytes[..end].iter().copied().chain(chunks).chain(*b"0\r\n\r\n").collect::<Vec<_>>())
        });
        let keepers = [bytewise, torn];
        let proxy = before(v, &keepers).start();
        for _ in 0..4 {
            let id = made(&proxy, STREAMED);
            assert_eq!(proxy.holder_of(&id), Some(holder(&keepers, &id).0.url()), "{id}");
        }
        assert!(keepers.iter().all(|(_, store)| !store.lock().unwrap().is_empty()), "both were asked");
    }

    fn what_nobody_can_ask_for_later_is_not_remembered(v: Variant) {
        let respond = |request: &Request| {
            let id = request.header("x-id").unwrap();
            let body = response(&id).to_string();
            match &id[..] {
                "resp_gzip" => script().send(answer("200 OK", "application/json", "content-encoding: gzip\r\n", body)),
                "resp_201" => script().send(answer("201 Created", "application/json", "", body)),
                _ => script().send(json_answer(body)),
            }
        };
        let mocks = [0, 1].map(|_| worker().on_request("*", respond).start());
        let proxy = mocks.iter().fold(proxy(v), |proxy, worker| proxy.worker(worker)).start();
        let ask = |path: &str, id: &str, body: &str| {
            let fields = format!("x-id: {id}\r\ncontent-type: application/json\r\n");
            proxy.client().request("POST", path, &fields, body.as_bytes());
            proxy.holder_of(id)
        };
        for (id, body) in [
            ("resp_unstored", r#"{"model":"m","store":false}"#),
            ("resp_null", r#"{"model":"m","store":null}"#),
            ("resp_gzip", PLAIN),
            ("resp_201", PLAIN),
        ] {
            assert_eq!(ask(PATH, id, body), None, "{id}");
        }
        for path in ["/v1/chat/completions", "/v1/completions", "/v1/responses/render", "/v1/messages"] {
            assert_eq!(ask(path, "resp_other", PLAIN), None, "{path}");
        }
        assert!(ask(PATH, "resp_stored", PLAIN).is_some() && ask(PATH, "resp_true", r#"{"store":true}"#).is_some());
    }
}

/// The data of a body in chunks.
fn stream_data(mut chunks: &[u8]) -> Vec<u8> {
    let mut data = Vec::new();
    loop {
        let line = chunks.windows(2).position(|two| two == b"\r\n").unwrap();
        let size = usize::from_str_radix(std::str::from_utf8(&chunks[..line]).unwrap(), 16).unwrap();
        if size == 0 {
            return data;
        }
        data.extend(&chunks[line + 2..line + 2 + size]);
        chunks = &chunks[line + 4 + size..];
    }
}
