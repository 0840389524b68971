# Built with the toolchain that CI uses; the image is one static binary and nothing else.
FROM rust:1.95-bookworm AS builder
WORKDIR /build
COPY Cargo.toml Cargo.lock ./
COPY src src
# The target is named so that the flags do not reach build scripts and macros, which cannot be static.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/build/target \
    target="$(rustc --print host-tuple)" \
    && RUSTFLAGS="-C target-feature=+crt-static" \
        cargo build --locked --release --bin vllm-proxy --target "$target" \
    && cp "target/$target/release/vllm-proxy" /vllm-proxy

FROM scratch
# Whom a rediss:// server's certificate may be of.
COPY --from=builder /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=builder /vllm-proxy /vllm-proxy
USER 65532:65532
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s CMD ["/vllm-proxy", "healthcheck"]
ENTRYPOINT ["/vllm-proxy"]
