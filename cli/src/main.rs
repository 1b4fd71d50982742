//! The program `lora`. Everything it does is in the library, which `lora-engine` shares.

fn main() -> std::process::ExitCode {
    lora_cli::app::main()
}
