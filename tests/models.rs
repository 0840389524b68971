//! Which worker a request goes to, by its model's name; aliases, default model, adapters, unknown names.

use crate::support::{
    Response, Worker, client, eventually, json_answer, proxy, script, variants, worker, worker::Request,
};

/// Two workers, one with model `a`, the other with model `b`; both answer whatever they are asked with the body.
fn two() -> [Worker; 2] {
    [worker().model("a").echo().start(), worker().model("b").echo().start()]
}

fn names(workers: &[Worker; 2]) -> String {
    workers.iter().zip(["a", "b"]).map(|(worker, name)| name.repeat(worker.requests().len())).collect()
}

fn form(parts: &[(&str, Option<&str>, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, file, data) in parts {
        let file =
            file.map(|file| format!("; filename=\"{file}\"\r\nContent-Type: audio/wav")).unwrap_or_default();
        bytes.extend(
            format!("--XyZ\r\nContent-Disposition: form-data; name=\"{name}\"{file}\r\n\r\n").into_bytes(),
        );
        bytes.extend_from_slice(data);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"--XyZ--\r\n");
    bytes
}

const FORM: &str = "Content-Type: multipart/form-data; boundary=XyZ\r\n";

fn assert_error(answer: &Response, body: &str) {
    assert_eq!(answer.status, 404, "{answer}");
    assert_eq!(answer.text(), body);
    assert_eq!(answer.header("content-type").as_deref(), Some("application/json"));
    assert_eq!(answer.header("content-length"), Some(body.len().to_string()));
}

variants! {
    fn a_request_goes_to_a_worker_that_has_its_model(v: Variant) {
        let workers = two();
        let proxy = proxy(v).worker(&workers[0]).worker(&workers[1]).start();
        let mut client = proxy.client();
        for path in ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings",
            "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank", "/tokenize",
            "/detokenize", "/v1/messages/count_tokens", "/v2/embed", "/inference/v1/generate", "/invocations",
            "/v1/chat/completions/batch", "/v1/chat/completions/render", "/generative_scoring"]
        {
            for name in ["b", "a"] {
                client.post(path, format!(r#"{{"model":"{name}","prompt":"x"}}"#)).expect(200);
            }
            assert_eq!(names(&workers), "ab", "{path}");
            assert_eq!(workers[0].only_request().json()["model"], "a", "{path}");
            assert_eq!(workers[1].only_request().json()["model"], "b", "{path}");
            workers.iter().for_each(Worker::forget);
        }
    }

    fn the_model_is_found_however_it_is_written(v: Variant) {
        let workers = two();
        let proxy = proxy(v).worker(&workers[0]).worker(&workers[1]).start();
        let mut client = proxy.client();
        let filler = "\\\"model\\\":\\\"a\\\" and \\\\".repeat(30_000);
        let bodies = [
            r#"{"model":"b"}"#.to_owned(),
            r#"{"model":"a","messages":[],"model":"b"}"#.to_owned(),
            r#"{"mod\u0065l":"b"}"#.to_owned(),
            r#"{"model":"a","\u006dodel":"\u0062"}"#.to_owned(),
            "\r\n\t {\n \"x\" : 1 ,\n\t\"model\"\n:\n\"b\"\n}\n".to_owned(),
            r#"{"messages":[{"model":"a","role":"user","content":"\"model\":\"a\""}],"model":"b"}"#.to_owned(),
            r#"{"model":"b","tools":[{"model":"a"}],"x":{"model":"a"}}"#.to_owned(),
            r#"{"Model":"a","model ":"a","model":"b","MODEL":"a"}"#.to_owned(),
            format!(r#"{{"messages":[{{"role":"user","content":"{filler}"}}],"model":"b"}}"#),
            format!(r#"{{"model":"b","messages":[{{"role":"user","content":"{filler}"}}]}}"#),
        ];
        for (count, body) in bodies.iter().enumerate() {
            client.post("/v1/chat/completions", body).expect(200);
            assert_eq!(names(&workers), "b".repeat(count + 1), "{}", &body[..body.len().min(90)]);
            assert_eq!(workers[1].requests()[count].body, body.as_bytes());
        }
    }

    fn a_model_is_found_in_a_chunked_body_cut_anywhere(v: Variant) {
        let workers = two();
        let proxy = proxy(v).worker(&workers[0]).worker(&workers[1]).start();
        let mut client = proxy.client();
        let body = r#"{"messages":[],"mod\u0065l":"\u0062"}"#;
        for cut in 1..body.len() {
            let (one, two) = body.split_at(cut);
            client.send(format!(
                "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n\
                 Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{one}\r\n{:x}\r\n{two}\r\n0\r\n\r\n", one.len(), two.len()));
            client.response().expect(200);
        }
        assert_eq!(names(&workers), "b".repeat(body.len() - 1));
        assert!(workers[1].requests().iter().all(|got| got.body == body.as_bytes()));
    }

    fn a_form_is_routed_by_its_model_field_before_or_after_the_file(v: Variant) {
        let workers = two();
        let proxy = proxy(v).worker(&workers[0]).worker(&workers[1]).start();
        let mut client = proxy.client();
        let mut sound = crate::compat::noise(400_000);
        sound.extend_from_slice(b"\r\n--XyY\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\na\r\n");
        let after = form(&[("file", Some("model"), &sound), ("language", None, b"en"), ("model", None, b"b")]);
        let before = form(&[("model", None, b"b"), ("file", Some("a.wav"), &sound)]);
        for body in [&after, &before] {
            for path in ["/v1/audio/transcriptions", "/v1/audio/translations"] {
                client.request("POST", path, FORM, body).expect(200);
            }
        }
        let quoted = "Content-Type: multipart/form-data; charset=utf-8; boundary=\"XyZ\"\r\n";
        client.request("POST", "/v1/audio/transcriptions", quoted, &after).expect(200);
        assert_eq!(names(&workers), "bbbbb");
        assert!(workers[1].requests()[0].body == after && workers[1].requests()[2].body == before);
    }

    fn a_websocket_is_routed_by_the_model_in_its_query(v: Variant) {
        let refusal = || script().send(json_answer("{}"));
        let workers = [worker().model("a").on("/v1/realtime", refusal()).start(),
            worker().model("b").on("/v1/realtime", refusal()).start()];
        let proxy = proxy(v).worker(&workers[0]).worker(&workers[1]).start();
        for _ in 0..4 {
            proxy.get("/v1/realtime?intent=x&model=b").expect(200);
        }
        assert_eq!(names(&workers), "bbbb");
    }

    fn a_request_without_a_model_means_the_default_model(v: Variant) {
        let workers = two();
        let proxy = proxy(v).worker(&workers[0]).worker(&workers[1]).arg("--default-model", "b").start();
        let mut client = proxy.client();
        for body in [r#"{"messages":[]}"#, r#"{"model":null}"#, r#"{"model":""}"#, r#"{"model":"a","model":null}"#] {
            client.post("/v1/chat/completions", body).expect(200);
            assert_eq!(workers[1].requests().pop().unwrap().body, body.as_bytes());
        }
        assert_eq!(names(&workers), "bbbb");
    }

    fn where_all_workers_have_one_model_they_judge_its_name(v: Variant) {
        let worker = worker().model("a").echo().start();
        let proxy = proxy(v).worker(&worker).start();
        proxy.post("/v1/chat/completions", client::chat("nope")).expect(200);
        assert_eq!(worker.only_request().json()["model"], "nope");
    }

    fn where_there_is_one_model_it_need_not_be_named(v: Variant) {
        let worker = worker().model("only").echo().start();
        let proxy = proxy(v).worker(&worker).start();
        for body in [r#"{"messages":[]}"#, r#"{"model":null}"#, r#"{"model":""}"#] {
            proxy.post("/v1/chat/completions", body).expect(200);
        }
        assert_eq!(worker.requests().len(), 3);
    }

    fn an_unknown_model_is_answered_as_vllm_words_it(v: Variant) {
        let workers = two();
        let proxy = proxy(v).worker(&workers[0]).worker(&workers[1]).start();
        let mut client = proxy.client();
        let ask = r#"{"model":"nope","messages":[],"stream":true}"#;
        let chat = r#"{"error":{"message":"The model `nope` does not exist. Valid aliases: a, b.","type":"NotFoundError","param":"model","code":404}}"#;
        for path in ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"] {
            assert_error(&client.post(path, ask), chat);
        }
        let messages = r#"{"type":"error","error":{"type":"NotFoundError","message":"The model `nope` does not exist. Valid aliases: a, b."}}"#;
        assert_error(&client.post("/v1/messages", ask), messages);
        let pooling = r#"{"error":{"message":"The model `nope` does not exist.","type":"NotFoundError","param":null,"code":404}}"#;
        for path in ["/v1/embeddings", "/score", "/rerank", "/pooling"] {
            assert_error(&client.post(path, ask), pooling);
        }
        assert_eq!(names(&workers), "");
    }

    fn an_unknown_models_name_cannot_break_the_answer(v: Variant) {
        let workers = two();
        let proxy = proxy(v).worker(&workers[0]).worker(&workers[1]).start();
        let answer = proxy.post("/v1/chat/completions", r#"{"model":"x\"},\n\\\u0001é\ud83e\udd99"}"#);
        assert_eq!(answer.status, 404);
        let want = "The model `x\"},\n\\\u{1}é\u{1f999}` does not exist. Valid aliases: a, b.";
        assert_eq!(answer.json()["error"]["message"], want);
        let long = "x".repeat(100_000);
        let answer = proxy.post("/v1/chat/completions", format!(r#"{{"model":"{long}"}}"#));
        assert_eq!(answer.status, 404);
        assert!(answer.json()["error"]["message"].is_string());
    }

    fn an_adapter_is_served_by_the_workers_that_have_it(v: Variant) {
        let workers = [worker().model("a").echo().start(), worker().model("a").lora("lo1", "a").echo().start()];
        let proxy = proxy(v).worker(&workers[0]).worker(&workers[1]).start();
        for _ in 0..6 {
            proxy.post("/v1/chat/completions", client::chat("lo1")).expect(200);
        }
        assert_eq!((workers[0].requests().len(), workers[1].requests().len()), (0, 6));
        let answer = proxy.post("/v1/chat/completions", client::chat("lo2"));
        assert!(answer.text().contains("Valid aliases: a.\""), "an adapter is no valid alias: {answer}");
    }

    fn an_alias_is_replaced_and_nothing_else(v: Variant) {
        let worker = worker().model("org/model-a").echo().start();
        let proxy = proxy(v).worker(&worker).arg("--static-aliases", "gpt:org/model-a,a-much-longer-name:org/model-a")
            .start();
        let mut client = proxy.client();
        let big = crate::compat::noise(40_000).escape_ascii().to_string().replace(['\\', '"'], "_");
        let bodies = [
            (r#"{"model":"gpt"}"#.to_owned(), r#"{"model":"org/model-a"}"#.to_owned()),
            (r#" { "x" : 1.0e5 , "model" : "a-much-longer-name" , "y": "gpt" } "#.to_owned(),
             r#" { "x" : 1.0e5 , "model" : "org/model-a" , "y": "gpt" } "#.to_owned()),
            (r#"{"mod\u0065l":"\u0067pt","z":"\u0067pt"}"#.to_owned(),
             r#"{"mod\u0065l":"org/model-a","z":"\u0067pt"}"#.to_owned()),
            (format!(r#"{{"messages":"{big}","model":"gpt","end":1}}"#),
             format!(r#"{{"messages":"{big}","model":"org/model-a","end":1}}"#)),
            (r#"{"model":"org/model-a"}"#.to_owned(), r#"{"model":"org/model-a"}"#.to_owned()),
        ];
        for (sent, want) in &bodies {
            client.post("/v1/chat/completions", sent).expect(200);
            let got = worker.requests().pop().unwrap();
            assert_eq!(String::from_utf8(got.body.clone()).unwrap(), *want);
            assert_eq!(got.header("content-length"), Some(want.len().to_string()));
        }
        for (sent, want) in &bodies {
            let (one, two) = sent.split_at(sent.len() / 2);
            client.send(format!("POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n\
                {:x}\r\n{one}\r\n{:x}\r\n{two}\r\n0\r\n\r\n", one.len(), two.len()));
            client.response().expect(200);
            assert_eq!(String::from_utf8(worker.requests().pop().unwrap().body).unwrap(), *want);
        }
    }

    fn an_alias_in_a_form_is_replaced(v: Variant) {
        let worker = worker().model("whisper-large").echo().start();
        let proxy = proxy(v).worker(&worker).arg("--static-aliases", "w:whisper-large").start();
        let sound = crate::compat::noise(100_000);
        let with = |model: &[u8]| form(&[("file", Some("w"), &sound), ("model", None, model), ("prompt", None, b"w")]);
        proxy.client().request("POST", "/v1/audio/transcriptions", FORM, &with(b"w")).expect(200);
        let got = worker.only_request();
        assert!(got.body == with(b"whisper-large"), "{}", got.body.len());
    }

    fn an_alias_of_the_last_duplicate_is_what_counts(v: Variant) {
        let workers = two();
        let proxy = proxy(v).worker(&workers[0]).worker(&workers[1]).arg("--static-aliases", "gpt:b").start();
        proxy.post("/v1/chat/completions", r#"{"model":"a","model":"gpt"}"#).expect(200);
        let got: Vec<Request> = workers[1].requests();
        assert_eq!(got.len(), 1, "{}", names(&workers));
        // Python's JSON takes the last duplicate
        assert_eq!(got[0].json()["model"], "b");
    }

    fn what_names_no_model_goes_to_one_kind_of_worker(v: Variant) {
        let workers = two();
        let proxy = proxy(v).worker(&workers[0]).worker(&workers[1]).start();
        let mut client = proxy.client();
        for _ in 0..4 {
            client.post("/v1/chat/completions", "[]");
            client.post("/v1/chat/completions", r#"{"model":5}"#);
            client.get("/v1/chat/completions");
            client.get("/tokenizer_info");
        }
        // the first model's; of the other kind a worker may not have the path
        assert_eq!(names(&workers), "a".repeat(16));
    }

    fn what_one_kind_of_worker_does_not_know_another_may(v: Variant) {
        let unknown = || script().send(crate::support::answer("404 Not Found", "application/json", "", r#"{"detail":"Not Found"}"#));
        let chat = worker().model("chat").on("/v1/embeddings", unknown()).on("/nobody", unknown()).echo().start();
        let embed = worker().model("embed").on("/nobody", unknown()).echo().start();
        let proxy = proxy(v).worker(&chat).worker(&embed).start();
        let mut client = proxy.client();
        for body in ["{bad", "[]", r#"{"model":5}"#] {
            client.post("/v1/embeddings", body).expect(200);
            assert_eq!(embed.complete_requests().last().unwrap().body, body.as_bytes());
        }
        assert_eq!(client.get("/nobody").expect(404).text(), r#"{"detail":"Not Found"}"#, "nobody has it");
        // a worker that has the model it is asked for is believed
        let served = embed.complete_requests().len();
        client.post("/v1/embeddings", r#"{"model":"chat"}"#).expect(404);
        assert_eq!(embed.complete_requests().len(), served);
        let retried = proxy.metric("vllm_proxy_retries_total{reason=\"other_kind\"}");
        assert_eq!(retried, Some(4.0));
    }

    fn a_worker_that_was_never_reached_is_no_other_kind(v: Variant) {
        let unknown = crate::support::answer("404 Not Found", "application/json", "", r#"{"detail":"Not Found"}"#);
        let worker = worker().model("chat").on("/nobody", script().send(unknown)).start();
        let proxy = proxy(v).worker(&worker).url(&crate::support::dead_url()).start();
        let answer = proxy.client().get("/nobody");
        assert_eq!((answer.status, answer.text()), (404, r#"{"detail":"Not Found"}"#));
    }

    fn a_worker_that_does_not_tell_its_models_may_have_any(v: Variant) {
        let open = worker().on("/v1/models", script().send(crate::support::answer(
            "401 Unauthorized", "application/json", "", r#"{"error":"Unauthorized"}"#))).echo().start();
        let proxy = proxy(v).url(&open.url()).start();
        eventually("the worker is in use", || proxy.get("/health").status == 200);
        proxy.post("/v1/chat/completions", client::chat("whatever")).expect(200);
        assert_eq!(open.complete_requests().len(), 1);
    }

    fn models_are_learnt_anew(v: Variant) {
        let workers = two();
        let proxy = proxy(v).worker(&workers[0]).worker(&workers[1]).start();
        workers[0].set_models(&["a", "new"]);
        eventually("the new model is found", || {
            proxy.post("/v1/chat/completions", client::chat("new")).status == 200
        });
        assert!(workers[1].requests().is_empty());
        workers[0].set_models(&["new"]);
        eventually("the old model is gone", || {
            proxy.post("/v1/chat/completions", client::chat("a")).status == 404
        });
    }

    fn a_clients_key_reaches_the_worker_with_the_request(v: Variant) {
        let worker = worker().echo().start();
        let proxy = proxy(v).worker(&worker).arg("--worker-api-key", "for-probes").start();
        let headers = "Authorization: Bearer of-the-client\r\nContent-Type: application/json\r\n";
        proxy.client().request("POST", "/v1/chat/completions", headers, client::chat("m").as_bytes()).expect(200);
        assert_eq!(worker.only_request().header("authorization").as_deref(), Some("Bearer of-the-client"));
        proxy.post("/v1/embeddings", client::chat("m")).expect(200);
        assert_eq!(worker.requests()[1].header("authorization"), None, "the probes' key was lent to a client");
        let probe = worker.all_requests().into_iter().find(|got| got.path() == "/v1/models").unwrap();
        assert_eq!(probe.header("authorization").as_deref(), Some("Bearer for-probes"));
    }
}
