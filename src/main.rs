//! The program: reads the command line, sets up the log, starts the proxy and waits for its end.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use vllm_proxy::{
    app,
    config::{self, Command, Config},
    healthcheck,
    telemetry::log,
};

/// The exit code of a command line or an environment that makes no sense, as with other tools.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let ended = match config::command(std::env::args_os()) {
        Ok(Command::Serve(config)) => logging(*config, app::run),
        Ok(Command::Demo(config)) => logging(*config, app::demo),
        Ok(Command::Healthcheck(settings)) => healthcheck::run(&settings).map_err(Into::into),
        Ok(Command::Print(text)) => print(&text),
        Err(refused) => return failed(&refused.to_string(), USAGE),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&format!("{error:#}"), 1),
    }
}

fn logging(config: Config, run: fn(Config) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let _log = log::init(&config.log)?;
    run(config)
}

fn print(text: &str) -> anyhow::Result<()> {
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        // Who asked has heard enough (`| head -1`).
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

fn failed(line: &str, code: u8) -> ExitCode {
    // Without a stderr there is nobody to tell.
    drop(writeln!(io::stderr(), "error: {line}"));
    ExitCode::from(code)
}
