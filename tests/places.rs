//! Where a worker may be: a name, an IPv6 address, a path below which its routes lie.

use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};

use crate::support::{eventually, proxy, variants, worker};

variants! {
    fn a_worker_is_found_by_a_name_without_dots(v: Variant) {
        let worker = worker().at(Ipv4Addr::LOCALHOST).start();
        let url = format!("http://localhost:{}", worker.addr().port());
        let proxy = proxy(v).url(&url).start();
        assert_eq!(proxy.client().chat("m").expect(200).completion(), "ok");
        assert_eq!(proxy.metric(&format!("vllm_proxy_worker_health{{worker=\"{url}\"}}")), Some(1.0));
    }

    fn a_port_that_another_proxy_listens_on_is_taken(v: Variant) {
        let worker = worker().start();
        let first = proxy(v).worker(&worker).start();
        let (ip, port) = (first.addr().ip().to_string(), first.addr().port().to_string());
        let url = worker.url();
        let flags = ["--host", &ip, "--port", &port, "--redis", "none", "--worker-urls", &url];
        let second = vllm_proxy::app::start(vllm_proxy::config::Config::from_flags(flags).unwrap());
        let error = second.unwrap_err().to_string();
        assert!(error.contains(&format!("cannot listen on {ip}:{port}")), "{error}");
    }

    fn a_name_that_does_not_resolve_harms_nobody(v: Variant) {
        let worker = worker().start();
        let proxy = proxy(v).url("http://no-such-host.invalid:8000").worker(&worker).start();
        for _ in 0..4 {
            proxy.client().chat("m").expect(200);
        }
    }

    fn a_worker_may_speak_ipv6(v: Variant) {
        if TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_err() {
            eprintln!("skipped: this host has no IPv6 loopback");
            return;
        }
        let worker = worker().at(Ipv6Addr::LOCALHOST).start();
        let proxy = proxy(v).url(&worker.url()).start();
        assert_eq!(proxy.client().chat("m").expect(200).completion(), "ok");
        assert!(proxy.usable_workers().contains(&worker.url()), "{}", worker.url());
    }

    fn a_workers_path_prefix_stands_before_every_target(v: Variant) {
        let worker = worker().echo().start();
        let proxy = proxy(v).url(&format!("{}/team/x/", worker.url())).without_waiting().start();
        eventually("the worker is reached", || proxy.get("/health").status == 200);
        proxy.client().request("POST", "/v1/chat/completions?a=b", "", br#"{"model":"m"}"#).expect(200);
        let got = worker.complete_requests();
        assert!(got.iter().any(|got| got.target == "/team/x/v1/chat/completions?a=b"), "{got:?}");
    }
}
