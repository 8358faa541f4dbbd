//! MLflow, by the REST API of its tracking server (mlflow.org/docs/latest/rest-api.html, version 2.0).

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use ureq::Agent;

use super::{Ending, Point, Tracker, finite};

/// What the server takes at once.
const MOST_METRICS: usize = 1000;
const MOST_PARAMETERS: usize = 100;
/// The longest value of a parameter.
const LONGEST_PARAMETER: usize = 6000;

/// What lets people into the server. Never printed.
#[derive(Clone)]
pub struct Credentials(Option<String>);

impl Credentials {
    /// A token, or else a name and a password, as the header `Authorization`.
    pub fn new(token: Option<String>, user: Option<(String, String)>) -> Self {
        use base64::Engine as _;
        use base64::prelude::BASE64_STANDARD;

        let basic = user.map(|(name, password)| {
            format!(
                "Basic {}",
                BASE64_STANDARD.encode(format!("{name}:{password}"))
            )
        });
        Self(token.map(|token| format!("Bearer {token}")).or(basic))
    }
}

/// A run of an experiment on a server.
pub struct Mlflow {
    agent: Agent,
    address: String,
    credentials: Credentials,
    experiment: String,
    run_name: String,
    parameters: Vec<(String, String)>,
    run: Option<String>,
}

impl Mlflow {
    /// A run called `run_name` in the experiment of this name, on the server at `address`.
    pub fn new(
        agent: Agent,
        address: &str,
        credentials: Credentials,
        experiment: String,
        run_name: String,
        parameters: Vec<(String, String)>,
    ) -> Self {
        Self {
            agent,
            address: address.trim_end_matches('/').to_owned(),
            credentials,
            experiment,
            run_name,
            parameters,
            run: None,
        }
    }

    /// The experiment's id; it is made if it is not there.
    fn experiment(&self) -> anyhow::Result<String> {
        let name = json!({ "experiment_name": self.experiment });
        let (status, answer) = self.get("experiments/get-by-name", &self.experiment)?;
        let found = answer
            .pointer("/experiment/experiment_id")
            .and_then(Value::as_str);
        if let Some(id) = found.filter(|_| status == 200) {
            return Ok(id.to_owned());
        }
        if status != 404 {
            bail!("{}", refusal(status, &answer));
        }
        let answer = self.post(
            "experiments/create",
            &json!({ "name": name["experiment_name"] }),
        )?;
        let id = answer.get("experiment_id").and_then(Value::as_str);
        Ok(id.context("the server names no experiment")?.to_owned())
    }

    fn get(&self, path: &str, experiment: &str) -> anyhow::Result<(u16, Value)> {
        let request = self
            .agent
            .get(self.at(path))
            .query("experiment_name", experiment);
        let request = match &self.credentials.0 {
            Some(value) => request.header("Authorization", value),
            None => request,
        };
        let mut answer = request.call()?;
        let status = answer.status().as_u16();
        let body = answer.body_mut().read_to_string().unwrap_or_default();
        Ok((status, serde_json::from_str(&body).unwrap_or_default()))
    }

    fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let request = self
            .agent
            .post(self.at(path))
            .header("Content-Type", "application/json");
        let request = match &self.credentials.0 {
            Some(value) => request.header("Authorization", value),
            None => request,
        };
        let mut answer = request.send(body.to_string())?;
        let status = answer.status().as_u16();
        let text = answer.body_mut().read_to_string().unwrap_or_default();
        let answer = serde_json::from_str(&text).unwrap_or_default();
        if status != 200 {
            bail!("{}", refusal(status, &answer));
        }
        Ok(answer)
    }

    fn at(&self, path: &str) -> String {
        format!("{}/api/2.0/mlflow/{path}", self.address)
    }

    fn run(&self) -> anyhow::Result<&str> {
        self.run.as_deref().context("it was not begun")
    }
}

/// What the server says to a request that it refuses.
fn refusal(status: u16, answer: &Value) -> String {
    let message = answer.get("message").and_then(Value::as_str);
    format!(
        "the server answers {status}: {}",
        message.unwrap_or("no reason")
    )
}

/// Milliseconds since 1970.
fn milliseconds(seconds: f64) -> u64 {
    (seconds * 1000.) as u64
}

impl Tracker for Mlflow {
    fn name(&self) -> String {
        format!("mlflow (`{}`)", self.address)
    }

    fn begin(&mut self, at: f64) -> anyhow::Result<()> {
        let run = json!({
            "experiment_id": self.experiment()?,
            "run_name": self.run_name,
            "start_time": milliseconds(at),
            "tags": [{ "key": "mlflow.source.name", "value": "pipeline" }],
        });
        let answer = self.post("runs/create", &run)?;
        let id = answer.pointer("/run/info/run_id").and_then(Value::as_str);
        let id = id.context("the server names no run")?.to_owned();
        self.run = Some(id.clone());
        for parameters in self.parameters.chunks(MOST_PARAMETERS) {
            let parameters: Vec<Value> = parameters
                .iter()
                .map(|(name, value)| {
                    let value: String = value.chars().take(LONGEST_PARAMETER).collect();
                    json!({ "key": name, "value": value })
                })
                .collect();
            self.post(
                "runs/log-batch",
                &json!({ "run_id": id, "params": parameters }),
            )?;
        }
        Ok(())
    }

    fn log(&mut self, points: &[Point]) -> anyhow::Result<()> {
        let metrics: Vec<Value> = points
            .iter()
            .flat_map(|point| {
                finite(&point.values).map(|(name, value)| {
                    json!({
                        "key": name,
                        "value": value,
                        "timestamp": milliseconds(point.at),
                        "step": point.step,
                    })
                })
            })
            .collect();
        for metrics in metrics.chunks(MOST_METRICS) {
            let body = json!({ "run_id": self.run()?, "metrics": metrics });
            self.post("runs/log-batch", &body)?;
        }
        Ok(())
    }

    fn end(&mut self, ending: Ending, at: f64) -> anyhow::Result<()> {
        let status = match ending {
            Ending::Finished => "FINISHED",
            Ending::Failed => "FAILED",
            Ending::Stopped => "KILLED",
        };
        let body = json!({
            "run_id": self.run()?,
            "status": status,
            "end_time": milliseconds(at),
        });
        self.post("runs/update", &body)?;
        Ok(())
    }
}
