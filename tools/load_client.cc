#include "tools/load_client.h"

#include <fmt/format.h>

#include <utility>  // before Asio: 1.74 needs std::exchange without including it

#include <boost/asio/connect.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>

#include <algorithm>
#include <chrono>
#include <deque>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>

namespace kvant::tools {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using asio::ip::tcp;
using Clock = std::chrono::steady_clock;
using ErrorCodeOf = boost::system::error_code;
using Json = nlohmann::json;

std::chrono::nanoseconds to_duration(double seconds) {
  return std::chrono::nanoseconds(static_cast<int64_t>(seconds * 1e9));
}

std::string words(const ErrorCodeOf& error) {
  if (error == beast::error::timeout) return "timeout";
  if (error == http::error::end_of_stream || error == http::error::partial_message ||
      error == asio::error::eof) {
    return "the server closed the connection";
  }
  return error.message();
}

http::request<http::string_body> make_request(const LoadOptions& options, http::verb verb,
                                              std::string_view path, std::string body) {
  http::request<http::string_body> request(verb, options.server.path + std::string(path), 11);
  request.set(http::field::host, options.server.host + ":" + options.server.port);
  request.set(http::field::user_agent, "kvant-bench");
  request.set(http::field::connection, "close");
  if (!options.api_key.empty()) {
    request.set(http::field::authorization, "Bearer " + options.api_key);
  }
  if (!body.empty()) request.set(http::field::content_type, "application/json");
  request.body() = std::move(body);
  request.prepare_payload();
  return request;
}

Result<tcp::resolver::results_type> resolve(asio::io_context& io, const ServerAddress& server) {
  ErrorCodeOf error;
  auto endpoints = tcp::resolver(io).resolve(server.host, server.port, error);
  if (error) {
    return Error(ErrorCode::kNotFound, fmt::format("{}: {}", server.host, error.message()));
  }
  return endpoints;
}

std::string request_body(const LoadRequest& request, const LoadOptions& options) {
  Json body = {{"model", options.model},
               {"prompt", request.prompt},
               {"max_tokens", request.output_tokens},
               {"min_tokens", request.output_tokens},
               {"ignore_eos", true},
               {"temperature", 0},
               {"stream", true},
               {"stream_options", {{"include_usage", true}}}};
  if (options.wants_token_ids) body["return_token_ids"] = true;
  return body.dump();
}

// One request on a connection of its own.
class Stream : public std::enable_shared_from_this<Stream> {
 public:
  using Done = std::function<void(Stream&)>;

  Stream(asio::io_context& io, Clock::time_point start, LoadRequest request, Done done)
      : socket_(io), start_(start), request_(std::move(request)), done_(std::move(done)) {
    result_.index = request_.index;
    result_.turn = request_.turn;
    result_.asked_prompt_tokens = static_cast<int64_t>(request_.prompt.size());
    result_.asked_output_tokens = request_.output_tokens;
    parser_.body_limit(std::numeric_limits<uint64_t>::max());  // none would be 0 in 1.74
  }

  void run(const tcp::resolver::results_type& endpoints, const LoadOptions& options) {
    message_ =
        make_request(options, http::verb::post, "/v1/completions", request_body(request_, options));
    socket_.expires_after(to_duration(options.timeout_seconds));
    result_.sent = now();
    socket_.async_connect(endpoints,
                          [self = shared_from_this()](ErrorCodeOf error, const tcp::endpoint&) {
                            if (error) return self->finish("connect: " + words(error));
                            self->send();
                          });
  }

  LoadRequest& request() { return request_; }
  LoadResult& result() { return result_; }
  const std::vector<int32_t>& answer() const { return answer_; }

 private:
  double now() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }

  void send() {
    ErrorCodeOf ignored;
    socket_.socket().set_option(tcp::no_delay(true), ignored);
    http::async_write(socket_, message_, [self = shared_from_this()](ErrorCodeOf error, size_t) {
      if (error) return self->finish("send: " + words(error));
      self->message_ = {};
      http::async_read_header(self->socket_, self->buffer_, self->parser_,
                              [self](ErrorCodeOf failed, size_t) {
                                if (failed) return self->finish(words(failed));
                                const int status = self->parser_.get().result_int();
                                if (status != 200)
                                  return self->finish(fmt::format("HTTP {}", status));
                                self->read();
                              });
    });
  }

  void read() {
    parser_.get().body().data = bytes_.data();
    parser_.get().body().size = bytes_.size();
    http::async_read_some(
        socket_, buffer_, parser_, [self = shared_from_this()](ErrorCodeOf error, size_t) {
          if (error == http::error::need_buffer) error = {};
          if (error) return self->finish(words(error));
          self->take({self->bytes_.data(), self->bytes_.size() - self->parser_.get().body().size});
          if (self->ended_) return self->finish({});
          if (self->parser_.is_done()) return self->finish("a stream without its end");
          self->read();
        });
  }

  void take(std::string_view text) {
    lines_ += text;
    size_t begin = 0;
    for (size_t end; (end = lines_.find('\n', begin)) != std::string::npos; begin = end + 1) {
      std::string_view line = std::string_view(lines_).substr(begin, end - begin);
      if (line.ends_with('\r')) line.remove_suffix(1);
      if (!line.starts_with("data:")) continue;
      line.remove_prefix(5);
      if (line.starts_with(' ')) line.remove_prefix(1);
      if (line == "[DONE]") {
        ended_ = true;
      } else {
        take_event(Json::parse(line, nullptr, false));
      }
    }
    lines_.erase(0, begin);
  }

  void take_event(const Json& event) {
    if (!event.is_object()) return;
    if (event.contains("usage") && event["usage"].is_object()) take_usage(event["usage"]);
    if (!event.contains("choices") || !event["choices"].is_array() || event["choices"].empty())
      return;
    const Json& choice = event["choices"][0];
    const bool has_text = choice.contains("text") && choice["text"].is_string() &&
                          !choice["text"].get_ref<const std::string&>().empty();
    const bool has_ids = choice.contains("token_ids") && choice["token_ids"].is_array() &&
                         !choice["token_ids"].empty();
    if (has_ids) {
      for (const Json& id : choice["token_ids"]) {
        if (id.is_number_integer()) answer_.push_back(id.get<int32_t>());
      }
    }
    if (!has_text && !has_ids) return;
    const double time = now();
    if (result_.first_token == 0) {
      result_.first_token = time;
    } else {
      result_.gaps.push_back(time - result_.last_token);
    }
    result_.last_token = time;
  }

  void take_usage(const Json& usage) {
    const auto number = [](const Json& object, const char* name, int64_t otherwise) {
      const bool there = object.contains(name) && object[name].is_number_integer();
      return there ? object[name].get<int64_t>() : otherwise;
    };
    result_.prompt_tokens = number(usage, "prompt_tokens", -1);
    result_.output_tokens = number(usage, "completion_tokens", -1);
    if (usage.contains("prompt_tokens_details") && usage["prompt_tokens_details"].is_object()) {
      result_.cached_tokens = number(usage["prompt_tokens_details"], "cached_tokens", 0);
    }
  }

  void finish(std::string error) {
    result_.error = std::move(error);
    result_.finished = now();
    ErrorCodeOf ignored;
    socket_.socket().close(ignored);
    done_(*this);
  }

  beast::tcp_stream socket_;
  const Clock::time_point start_;
  LoadRequest request_;
  Done done_;
  LoadResult result_;
  http::request<http::string_body> message_;
  beast::flat_buffer buffer_;
  http::response_parser<http::buffer_body> parser_;
  std::array<char, 16 << 10> bytes_;
  std::string lines_;  // an unfinished line at the end
  std::vector<int32_t> answer_;
  bool ended_ = false;  // [DONE] came
};

// Arrivals wait for their time, then for a place among the running ones.
class Load {
 public:
  Load(asio::io_context& io, const Workload& workload, const LoadOptions& options,
       const LoadProgress& progress, tcp::resolver::results_type endpoints)
      : io_(io),
        workload_(workload),
        options_(options),
        progress_(progress),
        endpoints_(std::move(endpoints)),
        arrival_timer_(io),
        progress_timer_(io) {}

  Result<std::vector<LoadResult>> run() {
    start_ = Clock::now();
    await_arrivals();
    report();
    io_.run();
    if (stopped_) return Error(ErrorCode::kCancelled, "interrupted");
    return std::move(results_);
  }

 private:
  void await_arrivals() {
    if (arrived_ == workload_.num_arrivals()) return;
    arrival_timer_.expires_at(start_ + to_duration(workload_.arrival_seconds(arrived_)));
    arrival_timer_.async_wait([this](ErrorCodeOf error) {
      if (error) return;
      const double now = std::chrono::duration<double>(Clock::now() - start_).count();
      while (arrived_ < workload_.num_arrivals() && workload_.arrival_seconds(arrived_) <= now) {
        ++arrived_;
      }
      start_waiting();
      await_arrivals();
    });
  }

  void start_waiting() {
    const auto limit =
        options_.concurrency > 0 ? static_cast<size_t>(options_.concurrency) : SIZE_MAX;
    while (running_ < limit && (!turns_.empty() || begun_ < arrived_)) {
      LoadRequest request;
      if (!turns_.empty()) {  // conversations that have begun go on first
        request = std::move(turns_.front());
        turns_.pop_front();
      } else {
        request = workload_.arrival(begun_++);  // made only now: prompts are large
      }
      ++running_;
      std::make_shared<Stream>(io_, start_, std::move(request), [this](Stream& s) {
        finished(s);
      })->run(endpoints_, options_);
    }
  }

  void finished(Stream& stream) {
    --running_;
    if (stopped_) return;
    const bool failed = !stream.result().error.empty();
    auto next = failed ? std::nullopt : workload_.next(stream.request(), stream.answer());
    results_.push_back(std::move(stream.result()));
    if (next) turns_.push_back(std::move(*next));
    start_waiting();
    const bool all = running_ == 0 && turns_.empty() && begun_ == workload_.num_arrivals();
    if (all) progress_timer_.cancel();
  }

  void report() {
    progress_timer_.expires_after(std::chrono::milliseconds(200));
    progress_timer_.async_wait([this](ErrorCodeOf error) {
      if (error) return;
      if (!progress_(results_.size(), running_)) {
        stopped_ = true;
        io_.stop();
        return;
      }
      report();
    });
  }

  asio::io_context& io_;
  const Workload& workload_;
  const LoadOptions& options_;
  const LoadProgress& progress_;
  const tcp::resolver::results_type endpoints_;
  asio::steady_timer arrival_timer_;
  asio::steady_timer progress_timer_;
  Clock::time_point start_;
  std::vector<LoadResult> results_;
  std::deque<LoadRequest> turns_;
  size_t arrived_ = 0;  // arrivals whose time has come
  size_t begun_ = 0;
  size_t running_ = 0;
  bool stopped_ = false;
};

}  // namespace

Result<ServerAddress> ServerAddress::parse(std::string_view url) {
  constexpr std::string_view kScheme = "http://";
  const auto bad = [&](std::string_view why) {
    return Error(ErrorCode::kInvalidArgument,
                 fmt::format("'{}' {}; expected http://HOST:PORT", url, why));
  };
  std::string_view rest = url;
  if (rest.starts_with("https://")) return bad("is TLS, which this client does not speak");
  if (rest.starts_with(kScheme)) rest.remove_prefix(kScheme.size());
  ServerAddress out;
  const size_t slash = std::min(rest.find('/'), rest.size());
  out.path = rest.substr(slash);
  while (out.path.ends_with('/')) out.path.pop_back();
  if (out.path.ends_with("/v1")) out.path.resize(out.path.size() - 3);
  std::string_view authority = rest.substr(0, slash);
  const size_t colon = authority.rfind(':');
  const bool has_port =
      colon != std::string_view::npos && authority.find(']', colon) == std::string_view::npos;
  out.port = has_port ? std::string(authority.substr(colon + 1)) : "80";
  if (has_port) authority = authority.substr(0, colon);
  if (authority.starts_with('[') && authority.ends_with(']')) {
    authority = authority.substr(1, authority.size() - 2);
  }
  out.host = authority;
  if (out.host.empty() || out.port.empty() ||
      out.port.find_first_not_of("0123456789") != std::string::npos) {
    return bad("is not an address");
  }
  return out;
}

Result<std::string> first_model(const LoadOptions& options) {
  try {
    asio::io_context io;
    KVANT_ASSIGN(const auto endpoints, resolve(io, options.server));
    tcp::socket socket(io);
    ErrorCodeOf error;
    asio::connect(socket, endpoints, error);
    const std::string where = fmt::format("{}:{}", options.server.host, options.server.port);
    if (error) {
      return Error(ErrorCode::kIoError,
                   fmt::format("{}: {}; is the server running?", where, error.message()));
    }
    http::write(socket, make_request(options, http::verb::get, "/v1/models", {}), error);
    beast::flat_buffer buffer;
    http::response<http::string_body> response;
    if (!error) http::read(socket, buffer, response, error);
    if (error) return Error(ErrorCode::kIoError, fmt::format("{}: {}", where, words(error)));
    if (response.result_int() != 200) {
      return Error(ErrorCode::kIoError,
                   fmt::format("{}/v1/models: HTTP {}", where, response.result_int()));
    }
    const Json json = Json::parse(response.body(), nullptr, false);
    const bool listed = json.is_object() && json.contains("data") && json["data"].is_array() &&
                        !json["data"].empty() && json["data"][0].contains("id") &&
                        json["data"][0]["id"].is_string();
    if (!listed)
      return Error(ErrorCode::kIoError,
                   fmt::format("{}/v1/models lists no model; give --model", where));
    return json["data"][0]["id"].get<std::string>();
  } catch (const std::exception& e) {
    return Error(ErrorCode::kIoError, e.what());
  }
}

Result<std::vector<LoadResult>> run_load(const Workload& workload, const LoadOptions& options,
                                         const LoadProgress& progress) {
  try {
    asio::io_context io(1);
    KVANT_ASSIGN(auto endpoints, resolve(io, options.server));
    return Load(io, workload, options, progress, std::move(endpoints)).run();
  } catch (const std::exception& e) {
    return Error(ErrorCode::kIoError, e.what());
  }
}

}  // namespace kvant::tools
