//! Adapters on disk, as PEFT writes and reads them: `adapter_config.json` beside `adapter_model.safetensors`.
//!
//! The configuration says what stands beside which layers ([`StoredAdapter`]); the weights are named as the model's
//! modules are, with `base_model.model.` in front (beside virtual tokens, which wrap no module, with `base_model.`). [`load_adapter`] accounts for every tensor of the file, and
//! [`save_adapter`] writes what PEFT loads without a missing or an unexpected key.

mod config;
mod files;
mod targets;

pub use config::StoredAdapter;
pub use files::{load_adapter, save_adapter};
pub use targets::{Adaptable, FrontSizes, head_modules};

/// The configuration's file.
pub const ADAPTER_CONFIG_FILE: &str = "adapter_config.json";
/// The weights' file.
pub const ADAPTER_WEIGHTS_FILE: &str = "adapter_model.safetensors";
