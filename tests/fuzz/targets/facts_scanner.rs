//! The facts scanner reads whatever a client sends, without a panic and without running away.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| {
    let _facts = vllm_proxy::vllm::scan_json(body);
});
