//! The one integration-test binary: drives the real program in temporary folders, without a network.

#[cfg(test)]
mod account;
#[cfg(test)]
mod adapters;
#[cfg(test)]
mod attacks;
#[cfg(test)]
mod bounds;
#[cfg(test)]
mod changes;
#[cfg(test)]
mod chat;
#[cfg(test)]
mod chat_templates;
#[cfg(test)]
mod commands;
#[cfg(test)]
mod data_cases;
#[cfg(test)]
mod defaults;
#[cfg(test)]
mod devices;
#[cfg(test)]
mod docs;
#[cfg(test)]
mod estimate;
#[cfg(test)]
mod executors;
#[cfg(test)]
mod families;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod files;
#[cfg(test)]
mod frozen;
#[cfg(test)]
mod gc;
#[cfg(test)]
mod generated;
#[cfg(test)]
mod gguf_export;
#[cfg(test)]
mod gguf_import;
#[cfg(test)]
mod history;
#[cfg(test)]
mod hub;
#[cfg(test)]
mod importing;
#[cfg(test)]
mod including;
#[cfg(test)]
mod init;
#[cfg(test)]
mod interruptions;
#[cfg(test)]
mod layers;
#[cfg(test)]
mod llama3;
#[cfg(test)]
mod lock;
#[cfg(test)]
mod longer;
#[cfg(test)]
mod looking;
#[cfg(test)]
mod matrix;
#[cfg(test)]
mod messages;
#[cfg(test)]
mod mistakes;
#[cfg(test)]
mod on_finish;
#[cfg(test)]
mod out_of_memory;
#[cfg(test)]
mod outputs;
#[cfg(test)]
mod parameters;
mod pins;
#[cfg(test)]
mod preference_losses;
#[cfg(test)]
mod preview;
#[cfg(test)]
mod processor;
#[cfg(test)]
mod publish;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod remote;
#[cfg(test)]
mod run_command;
#[cfg(test)]
mod same_numbers;
#[cfg(test)]
mod scores;
#[cfg(test)]
mod several_processes;
#[cfg(test)]
mod shards;
#[cfg(test)]
mod shells;
#[cfg(test)]
mod shrinking;
#[cfg(test)]
mod slurm;
#[cfg(test)]
mod story;
#[cfg(test)]
mod support;
#[cfg(test)]
mod table;
#[cfg(test)]
mod terminal;
#[cfg(test)]
mod tokens;
#[cfg(test)]
mod training_settings;
#[cfg(test)]
mod vars;
