//! Trackio, by the HTTP API of its server (`api/bulk_log` of trackio's server.py): the one that `trackio show` starts.

use anyhow::bail;
use serde_json::{Value, json};
use ureq::Agent;

use super::{Ending, Point, Tracker, finite};
use crate::report::tensorboard::tag;

/// A run of a project on a server.
pub struct Trackio {
    agent: Agent,
    address: String,
    /// What lets people write. Never printed.
    token: Option<String>,
    project: String,
    run: String,
    parameters: Value,
    /// The run's id: two runs of one name are two.
    id: String,
    sent: u64,
}

impl Trackio {
    /// A run of `project`. The address is as `trackio show` prints it, with its `write_token`.
    pub fn new(
        agent: Agent,
        address: &str,
        project: String,
        run: String,
        parameters: &[(String, String)],
    ) -> Self {
        let (address, query) = address.split_once('?').unwrap_or((address, ""));
        let token = query
            .split('&')
            .find_map(|pair| pair.strip_prefix("write_token="));
        let parameters = parameters.iter();
        Self {
            agent,
            address: address.trim_end_matches('/').to_owned(),
            token: token.map(str::to_owned),
            project,
            run,
            parameters: Value::Object(
                parameters
                    .map(|(name, value)| (name.clone(), json!(value)))
                    .collect(),
            ),
            id: String::new(),
            sent: 0,
        }
    }

    fn post(&self, logs: &Value) -> anyhow::Result<()> {
        let body = json!({ "kwargs": { "logs": logs, "hf_token": null } });
        let mut request = self
            .agent
            .post(format!("{}/api/bulk_log", self.address))
            .header("Content-Type", "application/json");
        if let Some(token) = &self.token {
            request = request.header("X-Trackio-Write-Token", token);
        }
        let mut answer = request.send(body.to_string())?;
        let status = answer.status().as_u16();
        let text = answer.body_mut().read_to_string().unwrap_or_default();
        let answer: Value = serde_json::from_str(&text).unwrap_or_default();
        let error = answer.get("error").and_then(Value::as_str);
        if status != 200 || error.is_some() {
            bail!(
                "the server answers {status}: {}",
                error.unwrap_or("no reason")
            );
        }
        Ok(())
    }
}

impl Tracker for Trackio {
    fn name(&self) -> String {
        format!("trackio (`{}`)", self.address)
    }

    fn begin(&mut self, at: f64) -> anyhow::Result<()> {
        let whole = format!(
            "{}\n{}\n{at}\n{}",
            self.project,
            self.run,
            std::process::id()
        );
        let digest = blake3::hash(whole.as_bytes()).to_hex();
        digest[..32].clone_into(&mut self.id);
        Ok(())
    }

    fn log(&mut self, points: &[Point]) -> anyhow::Result<()> {
        let logs = points.iter().enumerate().map(|(index, point)| {
            let values = finite(&point.values).map(|(name, value)| (tag(name), json!(value)));
            json!({
                "project": self.project,
                "run": self.run,
                "run_id": self.id,
                "step": point.step,
                "metrics": values.collect::<serde_json::Map<_, _>>(),
                "config": self.parameters,
                // What is sent again after an answer that got lost is kept once.
                "log_id": format!("{}-{}", self.id, self.sent + index as u64),
            })
        });
        let logs = Value::Array(logs.collect());
        self.post(&logs)?;
        self.sent += points.len() as u64;
        Ok(())
    }

    fn end(&mut self, _: Ending, _: f64) -> anyhow::Result<()> {
        Ok(())
    }
}
